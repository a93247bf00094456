"""Metrics as a Prometheus server reads them."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_elora.control import Changes, Counters, Histogram, StateMirror
from sglang_elora.control.histogram import SECONDS
from sglang_elora.control.metrics import HINTS, LORA_INFO, StateCollector, metric_rows
from tests.unit.test_state_mirror import POOL, adapter

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(mirror: StateMirror) -> Series:
    registry = CollectorRegistry()
    registry.register(
        StateCollector(mirror, lambda: {"a": "law", "b": "art"}, lambda: {"sent": 4}, "demo")
    )
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset({"model_name": "demo", **labels}.items())]


def test_metrics_export_the_mirrored_state() -> None:
    mirror = StateMirror()
    load_s = Histogram()
    for seconds in (0.0007, 0.003, 9.0):
        load_s.observe(seconds)
    counts = Counters(adapter_loads=3, adapter_evictions={"capacity": 2, "api": 1, "unload": 0})
    pool = msgspec.structs.replace(POOL, load_s=load_s, counts=counts.flat())
    rows = [adapter("a", "device", 25), adapter("b", "host")]
    mirror.apply(Changes(2, False, rows, pool), {"a", "b"})
    series = scraped(mirror)
    uses = {"free": 50, "adapters": 10, "kv_of_adapters": 25, "kv_of_base": 5, "running": 10}
    for use, slots in uses.items():
        assert of(series, "sglang:elora_pool_slots", use=use) == slots
    for tier, count in {"device": 1, "host": 1, "disk": 0, "loading": 0, "reading": 0}.items():
        assert of(series, "sglang:elora_adapters", tier=tier) == count
    assert of(series, "sglang:elora_adapter_loads_total") == 3
    assert of(series, "sglang:elora_adapter_evictions_total", reason="api") == 1
    names = [name for name, _ in series]
    assert names.count("sglang:elora_adapter_evictions_total") == 3, "one per reason, no sum"
    assert of(series, "sglang:elora_hints_sent_total") == 4
    assert of(series, "sglang:elora_sessions") == 6
    assert of(series, "sglang:elora_adapter_load_seconds_bucket", le="0.001") == 1
    assert of(series, "sglang:elora_adapter_load_seconds_bucket", le="5.0") == 2
    assert of(series, "sglang:elora_adapter_load_seconds_bucket", le="+Inf") == 3
    assert of(series, "sglang:elora_adapter_load_seconds_sum") == pytest.approx(9.0037)
    info = [labels for name, labels in series if name == LORA_INFO]
    assert dict(info[0]) == {
        "model_name": "demo",
        "running_lora_adapters": "art,law",
        "waiting_lora_adapters": "art",
        "max_lora": "256",
    }
    assert len(info) == 1


def test_metrics_are_empty_before_the_first_state() -> None:
    assert scraped(StateMirror()) == {}


@pytest.mark.parametrize("bound", SECONDS)
def test_histogram_bucket_includes_its_upper_bound(bound: float) -> None:
    histogram = Histogram()
    histogram.observe(bound)
    assert dict(histogram.cumulative())[str(bound)] == 1
    assert histogram.cumulative()[-1] == ("+Inf", 1)


def test_listed_metrics_are_those_that_are_exported() -> None:
    mirror = StateMirror()
    counts = Counters(adapter_evictions={"capacity": 1}).flat()
    mirror.apply(Changes(1, False, [], msgspec.structs.replace(POOL, counts=counts)), set())
    collector = StateCollector(mirror, dict, lambda: dict.fromkeys(HINTS, 1), "demo")
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels},
        )
        for family in collector.collect()
    }
    listed = {row.name: (row.kind, {"model_name", *row.labels}) for row in metric_rows()}
    exported["sglang:elora_adapter_load_seconds"][1].remove("le")
    assert exported == listed
