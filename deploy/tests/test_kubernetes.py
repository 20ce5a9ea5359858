"""Manifests: rendered by kustomize, held against the schemas of Kubernetes and of custom resources, against each other, and against the
real binary. No cluster has seen them."""

import functools
import json
import os
import re

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from conftest import DEPLOY, METRIC, ROOT, free_port, load, python_tool, run, serving, understood, with_keys

# The oldest release whose fields are used, as far as its schema knows them on by default, and the newest that the package has.
RELEASES = ["1.30", "1.37"]
CUSTOM = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}
# No package has their schemas; they were held against their definitions by hand, as README.md says.
UNCHECKED = {"InferencePool", "HTTPRoute"}
# Made by whoever installs, as README.md says.
FROM_OUTSIDE = {("Secret", "baton-keys"), ("PersistentVolumeClaim", "models")}
WORKLOADS = {"Deployment", "Job"}
KEYS = "/etc/baton/keys.toml"

KUSTOMIZATIONS = {
    "cpu": ["overlays/cpu"],
    "nvidia": ["overlays/nvidia"],
    "ascend": ["overlays/ascend"],
    "selftest of nvidia": ["selftest/nvidia"],
    "selftest of ascend": ["selftest/ascend"],
    "example": ["example"],
    "cpu, a volume, hpa": ["overlays/cpu", "components/model-volume", "components/hpa", "components/monitoring"],
    "nvidia, kept state": ["overlays/nvidia", "components/model-volume", "components/state"],
    "cpu, kept state": ["overlays/cpu", "components/state"],
    "ascend, a puller, keda": ["overlays/ascend", "components/model-puller", "components/keda"],
    "cpu, traces": ["overlays/cpu", "components/traces"],
    "nvidia, a puller, traces": ["overlays/nvidia", "components/model-puller", "components/traces"],
    "cpu, a gateway": ["overlays/cpu", "../gateway"],
    "nvidia, a gateway, a puller": ["overlays/nvidia", "components/model-puller", "../gateway"],
}
SELFTESTS = {name for name in KUSTOMIZATIONS if name.startswith("selftest")}
SERVING = sorted(KUSTOMIZATIONS.keys() - SELFTESTS)


@functools.cache
def rendered(name):
    """The objects of a kustomization: one of ours, or one that puts components onto it."""
    base, *components = [DEPLOY / "kubernetes" / path for path in KUSTOMIZATIONS[name]]
    folder = base
    if components:
        folder = ROOT / "target/deploy/kustomize" / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        above = {
            "namespace": "baton",
            "resources": [os.path.relpath(base, folder)],
            "components": [os.path.relpath(component, folder) for component in components],
            "configMapGenerator": [{"name": "baton-settings", "behavior": "merge", "literals": ["BATON_MODEL=/models/m"]}],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(above))
    return [document for document in yaml.safe_load_all(run(python_tool("kubectl"), "kustomize", folder)) if document]


def of(objects, kind, name="baton"):
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def workloads(objects):
    """Name, pod template and its one container of everything that runs."""
    for o in objects:
        if o["kind"] in WORKLOADS:
            [container] = o["spec"]["template"]["spec"]["containers"]
            yield o["metadata"]["name"], o["spec"]["template"], container


def settings(objects):
    """What the container of the server finds in its environment."""
    _, _, container = next(found for found in workloads(objects) if found[0] == "baton")
    [source] = container["envFrom"]
    data = of(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    # The request of processors, as the kubelet writes it.
    return data | {"BATON_THREADS": container["resources"]["requests"]["cpu"]}


def seconds(objects):
    template = of(objects, "Deployment")["spec"]["template"]["spec"]
    [container] = template["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    return before, int(settings(objects)["BATON_DRAIN_TIMEOUT"]), template["terminationGracePeriodSeconds"]


def matches(labels, selector):
    return selector["matchLabels"].items() <= labels.items()


@functools.cache
def validate(text):
    """Once for all kustomizations that have the object."""
    o = json.loads(text)
    kind = o["kind"]
    if model := CUSTOM.get(kind):
        read = model.model_validate(o).model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert read == o, f"{kind}: fields that its definition does not have"
    elif kind not in UNCHECKED:
        for release in RELEASES:
            kubernetes_validate.validate(o, release, strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_is_valid_and_in_the_namespace(name):
    for o in rendered(name):
        validate(json.dumps(o, sort_keys=True))
        assert o["kind"] == "Namespace" or o["metadata"]["namespace"] == "baton", o["kind"]


@pytest.mark.parametrize("name", SERVING)
def test_the_binary_takes_the_settings_and_the_port_as_they_are_written(name, tmp_path):
    objects = rendered(name)
    _, _, container = next(found for found in workloads(objects) if found[0] == "baton")
    table = understood(with_keys(container["args"], KEYS, tmp_path), settings(objects))
    rows = dict(line.split()[:2] for line in table.splitlines())
    assert rows["port"] == str(container["ports"][0]["containerPort"]) and rows["host"] == '"0.0.0.0"'
    keys = KEYS in container["args"]
    assert keys == any(volume["name"] == "keys" for volume in of(objects, "Deployment")["spec"]["template"]["spec"]["volumes"])
    assert (rows["api-keys-file"] != "-") == keys and (rows["allow-unauthenticated"] == "false") == keys


def test_a_replica_starts_as_it_is_written_with_keys_made_by_the_page(tmp_path):
    made = re.findall(r"^    (key=.* metrics=.*\n.*\n.*> keys.toml)$", (DEPLOY / "README.md").read_text(), re.M)
    clients, prometheus = run("bash", "-c", f'{made[0]}\necho "$key $metrics"', cwd=tmp_path).split()
    objects, port = rendered("cpu"), free_port()
    _, _, container = next(found for found in workloads(objects) if found[0] == "baton")
    arguments = [str(tmp_path / "keys.toml") if argument == KEYS else argument for argument in container["args"]]
    with serving(arguments, settings(objects) | {"BATON_PORT": str(port)}, port) as replica:
        granted = {key: [replica.call(path, key=key)[0] for path in ("/v1/models", "/metrics")] for key in (clients, prometheus, None)}
    assert granted == {clients: [200, 403], prometheus: [403, 200], None: [401, 401]}


def test_behind_a_gateway_a_replica_starts_as_it_is_written_and_the_picker_needs_no_key():
    objects, port = rendered("cpu, a gateway"), free_port()
    _, _, container = next(found for found in workloads(objects) if found[0] == "baton")
    here = {name: value for name, value in settings(objects).items() if name != "BATON_MODEL"} | {"BATON_PORT": str(port)}
    with serving(container["args"], here, port) as replica:
        assert [replica.call(path, key=None)[0] for path in ("/v1/models", "/metrics")] == [200, 200]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_nothing_runs_as_root_or_writes_where_it_should_not(name):
    for workload, template, container in workloads(rendered(name)):
        pod, own = template["spec"]["securityContext"], container["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] >= 10000 and pod["seccompProfile"] == {"type": "RuntimeDefault"}, workload
        assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False, workload
        assert own["capabilities"] == {"drop": ["ALL"]}, workload
        assert container["resources"]["limits"]["memory"], workload
        # A Service named baton would set BATON_PORT, which is a setting, to a URL.
        assert template["spec"]["enableServiceLinks"] is False, workload
        if workload != "baton-picker":
            assert template["spec"]["automountServiceAccountToken"] is False, workload
        assert not re.search(r":latest$|^[^:@]+$", container["image"]), container["image"]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_what_is_named_is_there(name):
    objects = rendered(name)
    known = {(o["kind"], o["metadata"]["name"]) for o in objects} | FROM_OUTSIDE
    for workload, template, container in workloads(objects):
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in known, volume
            if secret := volume.get("secret"):
                assert secret.get("optional") or ("Secret", secret["secretName"]) in known, volume
            if source := volume.get("configMap"):
                assert ("ConfigMap", source["name"]) in known, volume
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes.keys(), workload
        for variable in container.get("env", []):
            if source := variable.get("valueFrom", {}).get("configMapKeyRef"):
                assert source["key"] in of(objects, "ConfigMap", source["name"])["data"], variable
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if get := container.get(probe, {}).get("httpGet"):
                assert get["port"] in ports, probe
    for o in objects:
        if o["kind"] == "HorizontalPodAutoscaler":
            target = o["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in known
        if o["kind"] == "ScaledObject":
            assert ("Deployment", o["spec"]["scaleTargetRef"]["name"]) in known
        if o["kind"] == "Service":
            selected = [c for _, t, c in workloads(objects) if o["spec"]["selector"].items() <= t["metadata"]["labels"].items()]
            assert len(selected) == 1, o["metadata"]["name"]
            assert {p["targetPort"] for p in o["spec"]["ports"]} <= {p["name"] for p in selected[0]["ports"]}
        if o["kind"] in {"NetworkPolicy", "PodDisruptionBudget", "InferencePool", "PodMonitor"}:
            selector = o["spec"].get("podSelector") or o["spec"].get("selector")
            assert any(matches(t["metadata"]["labels"], selector) for _, t, _ in workloads(objects)), o["metadata"]["name"]


@pytest.mark.parametrize("name", SERVING)
def test_replicas_reach_the_collector_that_they_are_told_of_and_nobody_else(name):
    objects = rendered(name)
    labels = of(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and matches(labels, o["spec"]["podSelector"])]
    assert any("Egress" in policy["policyTypes"] for policy in policies)
    reached = {(port["port"], to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
               for policy in policies for rule in policy.get("egress", []) for port in rule["ports"]
               for to in rule["to"] if "namespaceSelector" in to}
    collector = settings(objects).get("BATON_OTLP_TRACES_ENDPOINT")
    if collector is None:
        assert reached == set()
    else:
        service, namespace, port = re.fullmatch(r"http://([\w-]+)\.([\w-]+)\.svc:(\d+)", collector).groups()
        assert reached == {(53, "kube-system"), (int(port), namespace)}, service


def test_spans_name_the_replica_that_they_are_from():
    variables = of(rendered("cpu, traces"), "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    names = [variable["name"] for variable in variables]
    # A variable can use those that stand before it.
    for used in re.findall(r"\$\((\w+)\)", variables[names.index("OTEL_RESOURCE_ATTRIBUTES")]["value"]):
        assert used in names[: names.index("OTEL_RESOURCE_ATTRIBUTES")], used


@pytest.mark.parametrize("name", SERVING)
def test_a_replica_leaves_when_its_last_reply_has_ended(name):
    """15 s until routers know, 45 s for replies, and what is left for error frames before it is killed."""
    before, drain, grace = seconds(rendered(name))
    assert (before, drain) == (15, 45) and grace >= before + drain + 10
    deployment = of(rendered(name), "Deployment")["spec"]
    startup = deployment["template"]["spec"]["containers"][0]["startupProbe"]
    assert deployment["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def test_probes_ask_what_the_server_answers_without_a_key(server):
    for name in SERVING:
        container = of(rendered(name), "Deployment")["spec"]["template"]["spec"]["containers"][0]
        paths = {probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        assert paths == {"startupProbe": "/startup", "readinessProbe": "/ready", "livenessProbe": "/live"}
    for path in paths.values():
        assert server.call(path, key=None)[0] == 200, path


@pytest.mark.parametrize("name", SERVING)
def test_replicas_belong_to_the_autoscaler_or_to_the_manifest(name):
    objects = rendered(name)
    scaled = any(o["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"} for o in objects)
    assert scaled != ("replicas" in of(objects, "Deployment")["spec"])


def test_every_replica_gets_the_model_that_was_pulled_with_the_same_image():
    for name in ("example", "ascend, a puller, keda", "nvidia, a gateway, a puller"):
        objects = rendered(name)
        puller = of(objects, "Job", "baton-pull")["spec"]["template"]["spec"]["containers"][0]
        server = of(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
        assert puller["image"] == server["image"]
        assert puller["args"] == ["pull", "$(BATON_MODEL)"]
        assert settings(objects)["HF_HUB_OFFLINE"] == "1"


def test_the_autoscaler_asks_for_what_the_adapter_makes():
    adapter = {rule["name"]["as"]: rule for rule in load("kubernetes/components/hpa/adapter.yaml")["rules"]["custom"]}
    asked = [m["pods"]["metric"]["name"] for m in of(rendered("cpu, a volume, hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]]
    assert sorted(asked) == sorted(adapter)
    assert {METRIC.match(rule["seriesQuery"]).group() for rule in adapter.values()} == {
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    }


def test_the_pool_is_the_replicas_and_its_picker_reads_their_metrics():
    objects = rendered("cpu, a gateway")
    pool, server = of(objects, "InferencePool")["spec"], of(objects, "Deployment")["spec"]["template"]
    assert [port["number"] for port in pool["targetPorts"]] == [server["spec"]["containers"][0]["ports"][0]["containerPort"]]
    picker = of(objects, "Service", pool["endpointPickerRef"]["name"])
    assert pool["endpointPickerRef"]["port"]["number"] in [port["port"] for port in picker["spec"]["ports"]]
    [rule] = of(objects, "HTTPRoute")["spec"]["rules"]
    assert [(ref["kind"], ref["name"]) for ref in rule["backendRefs"]] == [("InferencePool", "baton")]

    [container] = of(objects, "Deployment", "baton-picker")["spec"]["template"]["spec"]["containers"]
    assert "--pool-name=baton" in container["args"]
    config = load("gateway/picker-config.yaml")
    names = {plugin["type"] for plugin in config["plugins"]}
    assert {plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]} <= names
    # A picker sends no key, and finds the names by the label.
    assert not any(volume["name"] == "keys" for volume in server["spec"].get("volumes", []))
    extractor = next(plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor")
    assert [engine["name"] for engine in extractor["parameters"]["engineConfigs"]] == [server["metadata"]["labels"]["llm-d.ai/engine-type"]]


def test_selftests_are_of_the_image_and_the_resource_that_serve():
    for device in ("nvidia", "ascend"):
        selftest = of(rendered(f"selftest of {device}"), "Job", "baton-selftest")["spec"]["template"]["spec"]["containers"][0]
        serving = of(rendered(device), "Deployment")["spec"]["template"]["spec"]["containers"][0]
        assert selftest["image"] == serving["image"]
        of_device = lambda container: {k: v for k, v in container["resources"]["limits"].items() if "/" in k}
        assert of_device(selftest) == of_device(serving) != {}
        [asked] = [variable["value"] for variable in selftest["env"] if variable["name"] == "DEVICE"]
        assert asked == settings(rendered(device))["BATON_DEVICE"]
        commands = re.findall(r"baton (\w+) .*", selftest["args"][0])
        assert commands == ["doctor", "selftest"], json.dumps(selftest["args"])
