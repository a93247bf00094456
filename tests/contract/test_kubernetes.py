"""The manifests of examples/kubernetes are valid, fit together, and read metrics that exist."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_elora.commands.fleet import parsed
from sglang_elora.config import EloraConfig
from sglang_elora.control import AdapterState, Changes, Counters, StateMirror
from sglang_elora.control.metrics import StateCollector
from sglang_elora.launch_server import split_arguments
from tests.harness.manifests import (
    FOLDER,
    Object,
    built,
    containers,
    documents,
    engine,
    files,
    identity,
    merged,
    picker_config,
)
from tests.unit.test_state_mirror import POOL

PACKAGE = Path(__file__).parents[2] / "python" / "sglang_elora"
VERSIONS = ("1.33", "1.37")
"""Releases of Kubernetes whose schemas core objects fit: an older one, the newest of the tool."""
CORE = {"v1", "apps/v1", "policy/v1", "rbac.authorization.k8s.io/v1"}

VARIANTS = {
    "servers": built(FOLDER / "servers"),
    "volume": built(FOLDER / "servers", FOLDER / "adapters-volume"),
    "router": built(FOLDER / "router"),
    "gateway": built(FOLDER / "gateway"),
    "fleet": [*built(FOLDER / "servers"), *built(FOLDER / "fleet")],
    "monitoring": [*built(FOLDER / "servers"), *built(FOLDER / "monitoring")],
}
ALL = {identity(one): one for name in reversed(VARIANTS) for one in VARIANTS[name]}
"""Every object once, as it is without the volume."""

# Fields that each custom resource must have, by the schemas of: Gateway API 1.6, Gateway API
# inference extension 1.6.0, Istio 1.22 and later, the Prometheus operator. A path through a list
# holds for each element.
CUSTOM: dict[tuple[str, str], tuple[str, ...]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): (
        "spec.selector.matchLabels",
        "spec.targetPorts.number",
        "spec.endpointPickerRef.name",
        "spec.endpointPickerRef.port.number",
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): (
        "spec.gatewayClassName",
        "spec.listeners.name",
        "spec.listeners.port",
        "spec.listeners.protocol",
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): (
        "spec.parentRefs.name",
        "spec.rules.matches.path.value",
        "spec.rules.backendRefs.name",
    ),
    ("networking.istio.io/v1", "DestinationRule"): ("spec.host", "spec.trafficPolicy.tls.mode"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): (
        "spec.selector.matchLabels",
        "spec.endpoints.port",
        "spec.endpoints.path",
    ),
}
# Of the endpoint picker llm-d-router 0.9.0: plugins, and fields of an entry of engineConfigs.
PLUGINS = {
    "metrics-data-source",
    "core-metrics-extractor",
    "approx-prefix-cache-producer",
    "prefix-cache-scorer",
    "lora-affinity-scorer",
    "queue-scorer",
    "kv-cache-utilization-scorer",
    "max-score-picker",
}
SPECS = {"queuedRequests", "runningRequests", "kvUsage", "lora", "cacheBlockSize", "cacheNumBlocks"}
LORA_LABELS = {"running_lora_adapters", "waiting_lora_adapters", "max_lora"}


def values_at(value: Any, path: str) -> Iterator[Any]:
    """The values at a path of fields, one per element of the lists on it; None where it ends."""
    if isinstance(value, list):
        for element in value:
            yield from values_at(element, path)
    elif not path:
        yield value
    elif isinstance(value, dict):
        name, _, rest = path.partition(".")
        yield from values_at(value.get(name), rest)
    else:
        yield None


def labels_of(one: Object) -> dict[str, str]:
    """Labels of a workload's pods, of other objects their own."""
    template = one["spec"].get("template")
    found: dict[str, str] = (template or one)["metadata"]["labels"]
    return found


def matching(objects: list[Object], kinds: tuple[str, ...], selector: object) -> list[Object]:
    assert isinstance(selector, dict) and selector
    return [
        one
        for one in objects
        if one["kind"] in kinds and selector.items() <= labels_of(one).items()
    ]


def workload(name: str) -> tuple[Object, Object]:
    """The workload of this name with its only container."""
    (found,) = [
        pair for pair in containers(list(ALL.values())) if pair[0]["metadata"]["name"] == name
    ]
    return found


def expanded(container: Object, objects: list[Object]) -> list[str]:
    """The arguments of a container, with ``$(NAME)`` replaced as the kubelet does."""
    known = {variable["name"]: f"of-{variable['name']}" for variable in container.get("env", ())}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            name = source["configMapRef"]["name"]
            (settings,) = [one for one in objects if identity(one)[1:] == ("ConfigMap", name)]
            known |= settings["data"]
    return [
        re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], text) for text in container["args"]
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_each_file_is_yaml_that_a_kustomization_names(path: Path) -> None:
    assert documents(path)
    if path.name != "kustomization.yaml":
        (kustomization,) = documents(path.parent / "kustomization.yaml")
        patches = [patch["path"] for patch in kustomization.get("patches", ())]
        assert path.name in [*kustomization["resources"], *patches]


@pytest.mark.parametrize("version", VERSIONS)
def test_core_objects_pass_kubernetes_validate(version: str) -> None:
    checked = [one for one in [*ALL.values(), *VARIANTS["volume"]] if one["apiVersion"] in CORE]
    assert len(checked) >= len(ALL) - len(CUSTOM)
    for one in checked:
        kubernetes_validate.validate(one, version, strict=True)


def test_kubernetes_validate_refuses_an_unknown_field() -> None:
    servers, _ = workload("elora")
    wrong = merged(servers, {"spec": {"replica": 3}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key[1]} {key[2]}")
def test_custom_objects_have_the_fields_that_their_schemas_require(
    key: tuple[str, str, str],
) -> None:
    if key[0] in CORE:
        assert key[:2] not in CUSTOM
        return
    for path in CUSTOM[key[:2]]:
        assert None not in list(values_at(ALL[key], path)), path


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_has_an_object_twice(name: str) -> None:
    names = [identity(one) for one in VARIANTS[name]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", VARIANTS)
def test_selectors_match_exactly_one_workload_or_service(name: str) -> None:
    objects = VARIANTS[name]
    pods, services = ("StatefulSet", "Deployment"), ("Service",)
    for one in objects:
        spec = one.get("spec", {})
        selector = spec.get("selector")
        if selector is None:
            continue
        of_services = one["kind"] == "ServiceMonitor"
        labels = selector.get("matchLabels", selector)
        assert len(matching(objects, services if of_services else pods, labels)) == 1, one


@pytest.mark.parametrize("name", VARIANTS)
def test_ports_are_those_of_the_selected_containers(name: str) -> None:
    objects = VARIANTS[name]
    for one in objects:
        if one["kind"] not in ("Service", "InferencePool"):
            continue
        selector = one["spec"]["selector"]
        (target,) = matching(
            objects, ("StatefulSet", "Deployment"), selector.get("matchLabels", selector)
        )
        offered = target["spec"]["template"]["spec"]["containers"][0]["ports"]
        names = {port["name"] for port in offered}
        numbers = {port["containerPort"] for port in offered}
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= names
        else:
            assert {port["number"] for port in one["spec"]["targetPorts"]} <= numbers


def test_references_between_objects_name_objects_that_exist() -> None:
    objects = VARIANTS["gateway"]
    named = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    pool = named["InferencePool", "elora"]["spec"]["endpointPickerRef"]
    picker = named["Service", pool["name"]]
    assert pool["port"]["number"] in [port["port"] for port in picker["spec"]["ports"]]
    route = named["HTTPRoute", "elora"]["spec"]
    assert ("Gateway", route["parentRefs"][0]["name"]) in named
    for rule in route["rules"]:
        for backend in rule["backendRefs"]:
            assert (backend["kind"], backend["name"]) in named
    assert named["DestinationRule", "elora-picker"]["spec"]["host"] == pool["name"]
    servers = ALL["apps/v1", "StatefulSet", "elora"]["spec"]
    assert ("Service", servers["serviceName"]) in named
    for one, _ in containers(list(ALL.values())):
        account = one["spec"]["template"]["spec"].get("serviceAccountName")
        assert account is None or ("v1", "ServiceAccount", account) in ALL
    for key, one in ALL.items():
        if key[1] == "RoleBinding":
            assert (key[0], one["roleRef"]["kind"], one["roleRef"]["name"]) in ALL
            (subject,) = one["subjects"]
            assert ("v1", "ServiceAccount", subject["name"]) in ALL
            assert subject["namespace"] == one["metadata"]["namespace"]


def test_service_monitor_scrapes_a_port_that_the_service_has() -> None:
    (monitor,) = built(FOLDER / "monitoring")
    (service,) = matching(
        VARIANTS["monitoring"], ("Service",), monitor["spec"]["selector"]["matchLabels"]
    )
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


@pytest.mark.parametrize("name", ["servers", "volume"])
def test_flags_of_the_servers_are_accepted_by_the_parsers(name: str) -> None:
    from sglang.srt.server_args import ServerArgs

    objects = VARIANTS[name]
    ((_, server),) = [pair for pair in containers(objects) if pair[0]["kind"] == "StatefulSet"]
    assert server["command"] == ["python3", "-m", "sglang_elora.launch_server"]
    config, rest = split_arguments(expanded(server, objects))
    assert config.enabled and config.bad_adapter == "exit"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args(rest)
    port = server["ports"][0]
    assert (arguments.port, port["name"]) == (port["containerPort"], "http")
    assert arguments.enable_lora and arguments.enable_metrics
    assert arguments.admin_api_key == "of-ADMIN_API_KEY"
    place = "/adapters" if name == "volume" else "s3://example-bucket/adapters"
    assert config.adapter_sources == place
    assert arguments.lora_paths == [f"law={place}/law", f"travel={place}/travel"]
    mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert ("/adapters" in mounts) == (name == "volume")


def test_flags_of_the_router_are_accepted_by_its_parser() -> None:
    launch = pytest.importorskip("sglang_router.launch_router", reason="the extra [router]")
    _, router = workload("elora-router")
    arguments = launch.parse_router_args(expanded(router, VARIANTS["router"]))
    servers = ALL["apps/v1", "StatefulSet", "elora"]
    assert arguments.selector.items() <= labels_of(servers).items()
    port = servers["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert arguments.service_discovery and arguments.service_discovery_port == port
    assert arguments.health_check_endpoint == readiness_path()


def test_fleet_controller_names_each_server_of_the_stateful_set() -> None:
    _, controller = workload("elora-fleet")
    assert controller["command"] == ["sglang-elora", "fleet"]
    options = parsed(expanded(controller, VARIANTS["fleet"]))
    servers, server = workload("elora")
    name, port = servers["metadata"]["name"], server["ports"][0]["containerPort"]
    assert options.url == [
        f"http://{name}-{i}.{servers['spec']['serviceName']}:{port}"
        for i in range(servers["spec"]["replicas"])
    ]
    assert options.api_key == "of-ADMIN_API_KEY"


def endpoints() -> set[str]:
    """Paths of SGLang's app and of ours, as their sources name them."""
    spec = find_spec("sglang.srt.entrypoints.http_server")
    assert spec is not None and spec.origin is not None
    sources = [Path(spec.origin), *PACKAGE.joinpath("srt").rglob("*.py")]
    return {
        path
        for source in sources
        for path in re.findall(r'@app\.\w+\(\s*f?"(/[\w/]*)"', source.read_text())
    }


def readiness_path() -> str:
    _, server = workload("elora")
    found: str = server["readinessProbe"]["httpGet"]["path"]
    return found


def test_probes_of_the_servers_ask_endpoints_that_exist() -> None:
    _, server = workload("elora")
    probes = {kind: server[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= endpoints()
    assert readiness_path() == "/ready"
    # SGLang's /health answers within SGLANG_HEALTH_CHECK_TIMEOUT, 20 s by default.
    assert min(probes[kind]["timeoutSeconds"] for kind in ("startup", "liveness")) > 20


def test_pod_ends_only_after_the_drain_of_its_pre_stop_hook() -> None:
    servers, server = workload("elora")
    (shell, option, script) = server["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("/bin/sh", "-c")
    words = shlex.split(script)
    assert words[:3] == ["exec", "sglang-elora", "drain"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--url"] == f"http://127.0.0.1:{server['ports'][0]['containerPort']}"
    assert options["--api-key"] == "$ADMIN_API_KEY"
    grace_s = servers["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(options["--wait"]) + 30 <= grace_s
    picker, _ = workload("elora-picker")
    assert picker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= grace_s


def test_settings_that_look_like_elora_variables_are_known() -> None:
    settings = {name for one in ALL.values() if one["kind"] == "ConfigMap" for name in one["data"]}
    assert EloraConfig.from_env({name: "" for name in settings if "ELORA" in name})


def test_picker_config_names_known_plugins_and_refers_to_them() -> None:
    config = picker_config()
    assert (config["apiVersion"], config["kind"]) == ("llm-d.ai/v1alpha1", "EndpointPickerConfig")
    types = {plugin["type"] for plugin in config["plugins"]}
    assert types <= PLUGINS and "lora-affinity-scorer" in types
    (profile,) = config["schedulingProfiles"]
    assert {"pluginRef", "weight"} >= {key for plugin in profile["plugins"] for key in plugin}
    references = {plugin["pluginRef"] for plugin in profile["plugins"]}
    for source in config["dataLayer"]["sources"]:
        references |= {source["pluginRef"], *(one["pluginRef"] for one in source["extractors"])}
    assert references <= types
    assert {"lora-affinity-scorer", "metrics-data-source", "core-metrics-extractor"} <= references
    _, picker = workload("elora-picker")
    (mount,) = picker["volumeMounts"]
    (file,) = ALL["v1", "ConfigMap", "elora-picker"]["data"]
    assert f"--config-file={mount['mountPath']}/{file}" in picker["args"]


def test_pods_have_the_label_that_selects_the_engine_of_the_picker() -> None:
    servers, _ = workload("elora")
    assert labels_of(servers)["llm-d.ai/engine-type"] == engine()["name"]


def gauges_of_sglang() -> dict[str, set[str]]:
    """Names of the gauges that SGLang's scheduler sets, with labels of their own."""
    spec = find_spec("sglang.srt.observability.metrics_collector")
    assert spec is not None and spec.origin is not None
    found: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Gauge":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            own = {
                node.value
                for node in ast.walk(given["labelnames"])
                if isinstance(node, ast.Constant)
            }
            name = given["name"]
            assert isinstance(name, ast.Constant)
            found[name.value] = own
    return found


def test_picker_reads_gauges_of_sglang_that_have_one_series_per_rank() -> None:
    entry = engine()
    assert entry.keys() == {"name", *(f"{spec}Spec" for spec in SPECS)}
    gauges = gauges_of_sglang()
    for spec in SPECS - {"lora"}:
        name = entry[f"{spec}Spec"]
        # The picker takes one sample of the family: none may differ by a label such as a priority.
        assert gauges[name] == set(), name


def lora_sample(rows: list[AdapterState], names: Mapping[str, str]) -> dict[str, str]:
    """Labels of the only sample of the metric that the picker's ``loraSpec`` names."""
    mirror = StateMirror()
    pool = msgspec.structs.replace(POOL, counts=Counters().flat(), running=[], waiting=["b"])
    mirror.apply(Changes(1, False, rows, pool), names)
    registry = CollectorRegistry()
    registry.register(StateCollector(mirror, lambda: names, dict, "demo"))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    (family,) = [one for one in families if one.name == engine()["loraSpec"]]
    assert family.type == "gauge"
    (sample,) = family.samples
    assert sample.value > 0, "the picker takes the series with the largest value"
    return dict(sample.labels)


def test_picker_finds_adapters_on_the_device_by_the_names_that_requests_use() -> None:
    rows = [
        AdapterState("a", "device", False, 8, 0, 0, 0, 0, None),
        AdapterState("b", "host", False, 0, 64, 0, 0, 0, None),
        AdapterState("c", "disk", False, 0, 0, 0, 0, 0, None),
    ]
    labels = lora_sample(rows, {"a": "team/law", "b": "art", "c": "travel"})
    assert labels.keys() >= LORA_LABELS
    assert labels["running_lora_adapters"].split(",") == ["team/law"]
    assert labels["waiting_lora_adapters"].split(",") == ["art"]
    assert int(labels["max_lora"]) == POOL.most_in_batch


def test_service_monitor_drops_the_metric_that_makes_a_series_per_change() -> None:
    (monitor,) = built(FOLDER / "monitoring")
    (rule,) = monitor["spec"]["endpoints"][0]["metricRelabelings"]
    assert (rule["action"], rule["regex"]) == ("drop", engine()["loraSpec"])
