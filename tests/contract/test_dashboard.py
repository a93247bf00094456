"""The Grafana dashboard queries metrics that ELORA and SGLang export, and is consistent."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import runpy
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from sglang_elora.control import (
    AdapterState,
    Changes,
    Counters,
    HintLimiter,
    Histogram,
    PoolState,
    StateMirror,
)
from sglang_elora.control.metrics import StateCollector

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang_elora.srt.tokenizer.tokenizer_control import TokenizerControl

FOLDER = Path(__file__).parents[2] / "docs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "elora.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
COLLECTOR = "sglang.srt.observability.metrics_collector"

Exported = dict[str, set[str]]
"""Labels by the name of a series, as Prometheus stores it."""


def of_elora() -> Exported:
    numbers = dict.fromkeys(PoolState.__struct_fields__, 1)
    lists = {"waiting": [], "running": []}
    pool = PoolState(**{**numbers, **lists, "counts": Counters().flat(), "load_s": Histogram()})
    mirror = StateMirror()
    row = AdapterState("a", "device", False, 8, 0, 0, 0, 0, None)
    told = msgspec.convert(msgspec.to_builtins(pool), PoolState)
    mirror.apply(Changes(1, False, [row], told), {"a"})
    registry = SimpleNamespace(uses=dict)
    process = SimpleNamespace(num_hints=0, gate=HintLimiter(), _registry=registry, _leases={})
    hints = asyncio.run(TokenizerControl._report(process, None)).hints
    collected = CollectorRegistry()
    collected.register(StateCollector(mirror, lambda: {"a": "law"}, lambda: hints, "demo"))
    return {
        sample.name: set(sample.labels)
        for family in collected.collect()
        for sample in family.samples
    }


def of_sglang() -> Exported:
    """Return the metrics that SGLang's source creates, with their labels."""
    spec = find_spec(COLLECTOR)
    assert spec is not None and spec.origin is not None
    found: Exported = {}
    for call in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        name = given.get("name")
        if not isinstance(name, ast.Constant) or "labelnames" not in given:
            continue
        labels = {"model_name"} | {
            node.value
            for node in ast.walk(given["labelnames"])
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if "Histogram" in ast.unparse(call.func):
            found[f"{name.value}_bucket"] = {*labels, "le"}
        else:
            found[name.value] = labels
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


EXPORTED = {**of_sglang(), **of_elora()}


@pytest.mark.parametrize(("query", "legend"), list(expressions()))
def test_dashboard_queries_only_exported_metrics_and_labels(query: str, legend: str) -> None:
    metrics = re.findall(r"sglang:\w+", query)
    assert metrics
    for metric in metrics:
        assert metric in EXPORTED, f"nobody exports {metric}"
    grouped = {
        label.strip()
        for labels in re.findall(r"by \(([^)]*)\)", query)
        for label in labels.split(",")
    }
    for label in {*re.findall(r"(\w+)=~", query), *re.findall(r"\{\{(\w+)\}\}", legend), *grouped}:
        assert label in EXPORTED[metrics[0]], f"{metrics[0]} has no label {label}"


def test_dashboard_shows_every_elora_metric() -> None:
    shown = {name for query, _ in expressions() for name in re.findall(r"sglang:\w+", query)}
    histogram = "sglang:elora_adapter_load_seconds"
    left = set(of_elora()) - shown - {f"{histogram}_count", f"{histogram}_sum"}
    details = ("hints", "kv_slots_copied_ahead", "adapter_slots_from_host")
    assert left == {f"sglang:elora_{name}_total" for name in details}


def test_dashboard_json_equals_the_output_of_make_py() -> None:
    assert runpy.run_path(str(FOLDER / "make.py"))["dashboard"]() == DASHBOARD


def test_dashboard_has_the_fields_grafana_requires() -> None:
    assert DASHBOARD["schemaVersion"] >= 36 and re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert "id" not in DASHBOARD, "the server numbers dashboards"
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["source"]["type"] == "datasource"
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source["uid"] == "${source}" for source in sources)
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval"}
    assert used == set(variables)


def test_dashboard_panels_stay_in_the_grid_without_overlap() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
