"""One machine: the unit of systemd, and the composition with Prometheus and Grafana; and a proxy before several."""

import re
import shlex
import shutil

import pytest
from conftest import BATON, DEPLOY, ROOT, free_port, load, promtool, python_tool, run, serving, systemd_analyze, understood, with_keys

UNIT = DEPLOY / "systemd/baton.service"


@pytest.mark.parametrize("device", [None, "nvidia.conf", "ascend.conf"])
def test_systemd_takes_every_line_of_the_unit(device, tmp_path):
    unit = tmp_path / "baton.service"
    # The program must be there.
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/baton", BATON))
    if device:
        (tmp_path / "baton.service.d").mkdir()
        shutil.copy(DEPLOY / "systemd" / device, tmp_path / "baton.service.d")
    code, said = systemd_analyze("verify", unit)
    about_us = [line for line in said.splitlines() if "baton" in line]
    assert code == 0 and about_us == [], said


def test_the_unit_is_exposed_to_little():
    """Of 10: what is left is that it speaks to any address, sees other processes' existence, and shares the host's network."""
    code, said = systemd_analyze("security", "--offline=true", "--threshold=15", UNIT)
    assert code == 0, said


def test_the_units_command_is_understood_and_its_drain_fits(tmp_path):
    unit = UNIT.read_text()
    [command] = re.findall(r"^ExecStart=/usr/local/bin/baton (.*)$", unit, re.M)
    assert "StateDirectory=baton\n" in unit and "--state-dir %S/baton" in command
    table = understood(with_keys(shlex.split(command), "/etc/baton/keys.toml", tmp_path))
    [drain] = re.findall(r"^drain-timeout +(\d+) ", table, re.M)
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)s$", unit, re.M)
    assert int(stop) >= int(drain) + 10


def test_the_composition_is_well_formed_and_has_all_its_files():
    compose = load("compose/compose.yaml")
    run(python_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose/compose.yaml")
    secrets = sorted(secret["file"] for secret in compose["secrets"].values())
    ignored = run("git", "check-ignore", *(f"deploy/compose/{file}" for file in secrets), cwd=ROOT)
    assert len(ignored.splitlines()) == len(secrets), "keys must never be committed"
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert set(service.get("secrets", [])) <= compose["secrets"].keys(), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / "compose" / source).exists(), volume
    build = compose["services"]["baton"]["build"]
    assert (DEPLOY / "compose" / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).exists()


def test_the_commands_at_the_head_of_the_composition_make_its_secrets(tmp_path):
    compose = load("compose/compose.yaml")
    head = [line[4:] for line in (DEPLOY / "compose/compose.yaml").read_text().splitlines() if line.startswith("#   ")]
    assert head[-1].startswith("docker compose up")
    run("bash", "-euc", "\n".join(head[:-1]), cwd=tmp_path)
    made = {f"secrets/{path.name}" for path in (tmp_path / "secrets").iterdir()}
    assert {secret["file"] for secret in compose["secrets"].values()} <= made
    port = free_port()
    command = [str(tmp_path / "secrets/keys.toml") if part == "/run/secrets/keys" else part for part in compose["services"]["baton"]["command"]]
    command[command.index("/var/lib/baton/state")] = str(tmp_path / "state")
    with serving([*command, "--port", str(port)], {}, port) as server:
        for name, path in (("inference", "/v1/models"), ("metrics", "/metrics")):
            key = (tmp_path / "secrets" / name).read_text()
            assert server.call(path, key=key)[0] == 200, name


def test_the_composed_baton_is_understood_and_drains_before_it_is_killed(tmp_path):
    service = load("compose/compose.yaml")["services"]["baton"]
    table = understood(with_keys(service["command"], "/run/secrets/keys", tmp_path))
    [drain] = re.findall(r"^drain-timeout +(\d+) ", table, re.M)
    assert int(service["stop_grace_period"].removesuffix("s")) >= int(drain) + 10


def test_the_composed_health_check_tells_ready_from_not(server):
    kind, *command = load("compose/compose.yaml")["services"]["baton"]["healthcheck"]["test"]
    assert kind == "CMD"
    asked = [part.replace("/8000 ", f"/{server.port} ") for part in command]
    run(*asked)
    with pytest.raises(AssertionError):
        run(*(part.replace("/ready", "/nowhere") for part in asked))


def test_the_composed_prometheus_and_grafana_find_each_other_and_baton():
    compose = load("compose/compose.yaml")["services"]
    config = load("prometheus/prometheus.yml")
    assert config["rule_files"] == ["rules.yaml"] and "../prometheus:/etc/prometheus:ro" in compose["prometheus"]["volumes"]
    [job] = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["baton:8000"]}]
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["prometheus"]["secrets"]
    promtool("check", "config", "--syntax-only", "prometheus.yml", cwd=DEPLOY / "prometheus")
    [source] = load("compose/grafana/datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    [provider] = load("compose/grafana/dashboards.yaml")["providers"]
    assert f"../grafana:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]


def test_the_proxy_asks_for_the_model_that_is_served(server):
    config = load("litellm/config.yaml")
    assert len(config["model_list"]) == 2
    for model in config["model_list"]:
        dialect, name = model["litellm_params"]["model"].split("/", 1)
        assert dialect == "openai"
        assert server.call(f"/v1/models/{name}")[0] == 200
    keys = [config["general_settings"]["master_key"], *(m["litellm_params"]["api_key"] for m in config["model_list"])]
    assert all(key.startswith("os.environ/") for key in keys)
