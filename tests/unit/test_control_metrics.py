"""Metrics as a Prometheus server reads them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sglang_elora.control import Changes, Counters, Histogram, StateMirror
from sglang_elora.control.histogram import SECONDS
from sglang_elora.control.metrics import (
    ADAPTER_LOADED,
    HINTS,
    LORA_INFO,
    MOST_LISTED,
    StateCollector,
    metric_rows,
)
from tests.unit.test_state_mirror import POOL, adapter

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


NAMES = {"a": "law", "b": "art"}
POOL_NOW = msgspec.structs.replace(POOL, counts=Counters().flat())


def scraped(mirror: StateMirror, names: Mapping[str, str] = NAMES) -> Series:
    registry = CollectorRegistry()
    registry.register(StateCollector(mirror, lambda: names, lambda: {"sent": 4}, "demo"))
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


def lora_info(series: Series) -> dict[str, str]:
    (info,) = [dict(labels) for name, labels in series if name == LORA_INFO]
    return info


def loaded(series: Series) -> dict[str, tuple[str, str]]:
    """Level and pin of each adapter that is listed as loaded."""
    found = [dict(labels) for name, labels in series if name == ADAPTER_LOADED]
    assert {of(series, ADAPTER_LOADED, **_without_model(labels)) for labels in found} <= {1}
    return {labels["adapter_name"]: (labels["level"], labels["pinned"]) for labels in found}


def _without_model(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name != "model_name"}


def test_lora_info_lists_an_idle_adapter_on_the_device_as_running() -> None:
    mirror = StateMirror()
    pool = msgspec.structs.replace(POOL_NOW, running=[], waiting=["b"])
    mirror.apply(Changes(1, False, [adapter("a", "device"), adapter("b")], pool), {"a", "b"})
    info = lora_info(scraped(mirror))
    assert (info["running_lora_adapters"], info["waiting_lora_adapters"]) == ("law", "art")


def test_adapter_loaded_has_a_level_for_adapters_on_device_and_host_only() -> None:
    tiers = {"a": "device", "b": "host", "c": "loading", "d": "disk", "e": "reading"}
    names = {key: f"adapter-{key}" for key in tiers}
    mirror = StateMirror()
    rows = [adapter(key, tier) for key, tier in tiers.items()]
    rows[1] = msgspec.structs.replace(rows[1], pinned=True)
    mirror.apply(Changes(1, False, rows, POOL_NOW), set(tiers))
    assert loaded(scraped(mirror, names)) == {
        "adapter-a": ("gpu", "false"),
        "adapter-b": ("cpu", "true"),
        "adapter-c": ("cpu", "false"),
    }


def test_adapter_loaded_omits_an_adapter_whose_name_is_gone() -> None:
    mirror = StateMirror()
    mirror.apply(Changes(1, False, [adapter("a"), adapter("x")], POOL_NOW), {"a", "x"})
    assert loaded(scraped(mirror)) == {"law": ("cpu", "false")}


def test_adapter_loaded_is_bounded_and_prefers_the_device_then_recent_use() -> None:
    on_host = [
        msgspec.structs.replace(adapter(f"h{i}"), last_used_s=float(i)) for i in range(MOST_LISTED)
    ]
    rows = [*on_host, adapter("never"), adapter("d", "device")]
    names = {row.id: row.id for row in rows}
    mirror = StateMirror()
    mirror.apply(Changes(1, False, rows, POOL_NOW), names)
    listed = set(loaded(scraped(mirror, names)))
    assert len(listed) == MOST_LISTED
    assert "d" in listed
    assert set(names) - listed == {"never", "h0"}


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
    pool = msgspec.structs.replace(POOL, counts=counts)
    mirror.apply(Changes(1, False, [adapter("a")], pool), {"a"})
    collector = StateCollector(mirror, lambda: NAMES, lambda: dict.fromkeys(HINTS, 1), "demo")
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
