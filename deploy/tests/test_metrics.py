"""Every metric that is asked for somewhere in deploy/ is one that the real binary has, and a real Prometheus, set up by our own file, gets
an answer to every question."""

import json
import re
import subprocess
import urllib.parse
import urllib.request

import pytest
import yaml
from conftest import DEPLOY, KEY, METRIC, debian_tool, eventually, free_port, load, promtool


def dashboard_queries():
    dashboard = json.loads((DEPLOY / "grafana/baton.json").read_text())
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [(f"variable {v['name']}", v["query"]["query"]) for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return panels, variables


def alert_queries():
    return [(rule["alert"], rule["expr"]) for group in load("prometheus/rules.yaml")["groups"] for rule in group["rules"]]


def scaling_queries():
    triggers = load("kubernetes/components/keda/scaledobject.yaml")["spec"]["triggers"]
    asked = [(f"KEDA {trigger['name']}", trigger["metadata"]["query"]) for trigger in triggers]
    for rule in load("kubernetes/components/hpa/adapter.yaml")["rules"]["custom"]:
        series = METRIC.match(rule["seriesQuery"]).group()
        query = rule["metricsQuery"].replace("<<.Series>>", series)
        asked.append((rule["name"]["as"], query.replace("<<.LabelMatchers>>", 'namespace="baton"').replace("<<.GroupBy>>", "pod")))
    return asked


def test_every_name_is_one_that_the_server_has(server):
    text = server.metrics()
    known = set(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]", text, re.M))
    panels, variables = dashboard_queries()
    picker = yaml.safe_dump(load("gateway/picker-config.yaml"))
    for where, query in [*panels, *variables, *alert_queries(), *scaling_queries(), ("the picker", picker)]:
        names = set(METRIC.findall(query))
        assert names or "up{" in query, where
        assert names <= known, f"{where}: {names - known}"


def test_a_picker_finds_the_labels_that_it_reads(server):
    """As the core metrics extractor of llm-d Router reads vllm's: sizes of the cache, and adapters."""
    text = server.metrics()
    [cache] = re.findall(r"^vllm:cache_config_info\{(.*)\} 1$", text, re.M)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', cache))
    assert int(labels["block_size"]) > 0 and int(labels["num_gpu_blocks"]) > 0
    [adapters] = re.findall(r"^vllm:lora_requests_info\{(.*)\} [0-9.e+]+$", text, re.M)
    assert {"max_lora", "running_lora_adapters", "waiting_lora_adapters"} <= set(re.findall(r'(\w+)="', adapters))


def test_our_own_names_are_as_prometheus_would_have_them(server):
    # Names with vllm: are theirs.
    own = [line for line in server.metrics().splitlines() if "vllm:" not in line.split("{")[0]]
    assert any(line.startswith("baton_") for line in own)
    promtool("check", "metrics", stdin="\n".join(own) + "\n")


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """Asks a Prometheus that reads the server by our own file, with the labels of a pod."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(KEY)
    config = load("prometheus/prometheus.yml")
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yaml")]
    [job] = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"], "labels": {"namespace": "baton", "pod": "baton-0"}}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    program, env = debian_tool("usr/bin/prometheus", "prometheus")
    port = free_port()
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [program, *files, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    process = subprocess.Popen(command, env=env)

    def ask(path, **query):
        url = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(query)}"
        return json.load(urllib.request.urlopen(url, timeout=10))["data"]

    def is_up():
        assert process.poll() is None, "Prometheus ended"
        try:
            return ask("/api/v1/query", query='up{job="baton"} == 1')["result"]
        except OSError:
            return False

    try:
        eventually("Prometheus reads the server", is_up)
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_every_panel_and_every_scaler_gets_an_answer(server, prometheus):
    panels, _ = dashboard_queries()
    variables = {"$__rate_interval": "15s", "$instance": ".*", "$model": ".*"}

    def unanswered():
        server.call("/v1/completions", {"model": "abacus", "prompt": "What is 347 + 286?", "max_tokens": 16})
        missing = []
        for where, query in [*panels, *scaling_queries()]:
            for name, value in variables.items():
                query = query.replace(name, value)
            values = [sample["value"][1] for sample in prometheus("/api/v1/query", query=query)["result"]]
            if not values or "NaN" in values:
                missing.append((where, query, values))
        return missing

    missing = []

    def all_answered():
        missing[:] = unanswered()
        return not missing

    try:
        eventually("every query has an answer", all_answered)
    except AssertionError:
        raise AssertionError(f"no answer: {missing}") from None


def test_rules_are_evaluated_and_a_healthy_server_raises_none(prometheus):
    def rules():
        found = [rule for group in prometheus("/api/v1/rules")["groups"] for rule in group["rules"]]
        # Before the first scrape the server is absent.
        return all(rule["health"] == "ok" and rule["state"] == "inactive" for rule in found) and found

    names = [name for name, _ in alert_queries()]
    found = eventually("every rule has been evaluated, and none is raised", rules)
    assert [rule["name"] for rule in found] == names


def test_metrics_need_the_key_that_prometheus_is_given(server):
    assert server.call("/metrics", key=None)[0] == 401
    assert load("prometheus/prometheus.yml")["scrape_configs"][0]["authorization"]["credentials_file"] == "/run/secrets/metrics"
