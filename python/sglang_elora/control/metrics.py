"""The mirrored state as Prometheus metrics, next to SGLang's own on ``/metrics``.

They are built in the tokenizer process at each scrape: the scheduler writes no metrics, and no
series remains for a past set of running adapters.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sglang_elora.control.counters import families
from sglang_elora.control.mirror import StateMirror
from sglang_elora.control.state import AdapterState, PoolState, Tier

PREFIX = "sglang:elora_"
LORA_INFO = "sglang:lora_requests_info"
"""The metric that the Gateway API inference extension routes by, as its model server protocol
defines it; vLLM's is ``vllm:lora_requests_info``. The protocol lists as running what is on the
device: an adapter without requests stays listed until it is evicted."""
ADAPTER_LOADED = "sglang:lora_adapter_loaded"
"""Residency of each adapter, with the names and labels of ``vllm:lora_adapter_loaded``."""
LEVELS: Mapping[Tier, str] = {"device": "gpu", "loading": "cpu", "host": "cpu"}
"""Label ``level`` by tier. Adapters of the other tiers have no series."""
MOST_LISTED = 512
"""Most adapters in one scrape: thousands may be loaded, each series costs its readers memory, and
an endpoint picker scrapes several times per second. More lengthen each scrape."""


LOAD_SECONDS = "adapter_load_seconds"

Values = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number of the mirrored state, or with a label one for each value of the label."""

    name: str
    text: str
    read: Callable[[StateMirror, PoolState], Values]
    label: str = ""


def _adapters_by_tier(mirror: StateMirror, _pool: PoolState) -> Values:
    tiers = Counter(adapter.tier for adapter in mirror.adapters.values())
    return {tier: tiers[tier] for tier in get_args(Tier)}


def _num_pinned(mirror: StateMirror, _pool: PoolState) -> Values:
    return sum(adapter.pinned for adapter in mirror.adapters.values())


GAUGES = (
    Gauge("pool_slots", "Slots of the KV pool, by what they hold.", lambda _, p: p.uses, "use"),
    Gauge("adapters", "Adapters by where their weights are.", _adapters_by_tier, "tier"),
    Gauge("pinned_adapters", "Adapters that are pinned.", _num_pinned),
    Gauge("sessions", "Sessions that are not over.", lambda _, p: p.num_sessions),
    Gauge("host_kv_tokens", "Tokens of KV on the host.", lambda _, p: p.kv_host),
    Gauge(
        "host_adapter_bytes",
        "Bytes of adapters in host memory.",
        lambda _, p: p.adapter_host_bytes,
    ),
)
HINTS = {
    "sent": "Hints sent by the tokenizer process, since the start.",
    "repeated": "Hints not sent because their adapter was announced a moment before, since the "
    "start.",
    "over_rate": "Hints not sent because there were too many in a second, since the start.",
}
"""Text of each count of the tokenizer process's hints: the metric ``hints_NAME``."""

LOAD_SECONDS_TEXT = (
    "From the start of an adapter's copy to the device until it is known to be there."
)
LORA_INFO_TEXT = "Adapters on the device, and of the first waiting requests."
LORA_INFO_LABELS = ("running_lora_adapters", "waiting_lora_adapters", "max_lora")
ADAPTER_LOADED_TEXT = (
    f"1 for each adapter on the device (gpu) or in host memory (cpu), at most {MOST_LISTED}: those "
    "on the device first, then the most recently used."
)
ADAPTER_LOADED_LABELS = ("adapter_name", "level", "pinned")


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric as the documentation lists it: ``name`` is that of its series."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def metric_rows() -> Iterator[MetricRow]:
    """All metrics, in the order in which they are exported; each also has ``model_name``."""
    for gauge in GAUGES:
        yield MetricRow(PREFIX + gauge.name, "gauge", _if_any(gauge.label), gauge.text)
    for family in families():
        name = f"{PREFIX}{family.name}_total"
        yield MetricRow(name, "counter", _if_any(family.label), _since_start(family.text))
    for name, text in HINTS.items():
        yield MetricRow(f"{PREFIX}hints_{name}_total", "counter", (), text)
    yield MetricRow(PREFIX + LOAD_SECONDS, "histogram", (), LOAD_SECONDS_TEXT)
    yield MetricRow(LORA_INFO, "gauge", LORA_INFO_LABELS, LORA_INFO_TEXT)
    yield MetricRow(ADAPTER_LOADED, "gauge", ADAPTER_LOADED_LABELS, ADAPTER_LOADED_TEXT)


class StateCollector(Collector):
    """Prometheus collector of the mirrored state.

    Args:
        mirror: Updated before each scrape by the endpoint that serves it.
        names: Returns the names of the loaded adapters, by id.
        hints: Returns counts of this process's hints, by outcome.
        model_name: A label of each metric, as on SGLang's metrics.
    """

    def __init__(
        self,
        mirror: StateMirror,
        names: Callable[[], Mapping[str, str]],
        hints: Callable[[], Mapping[str, int]],
        model_name: str,
    ) -> None:
        self._mirror = mirror
        self._names = names
        self._hints = hints
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        pool = self._mirror.pool
        if pool is None:
            return
        for gauge in GAUGES:
            yield self._gauge(gauge, gauge.read(self._mirror, pool))
        yield from self._counters(pool.counts)
        for name, count in self._hints().items():
            yield self._counter(f"hints_{name}", HINTS[name], count)
        yield self._load_seconds(pool)
        names, loaded = self._names(), _first_loaded(self._mirror.adapters.values())
        yield self._lora_info(pool, loaded, names)
        yield self._adapter_loaded(loaded, names)

    def _gauge(self, gauge: Gauge, values: Values) -> Metric:
        labels = [*self._labels, *_if_any(gauge.label)]
        family = GaugeMetricFamily(PREFIX + gauge.name, gauge.text, labels=labels)
        by_label = values.items() if isinstance(values, Mapping) else [("", values)]
        for key, value in by_label:
            family.add_metric([*self._labels.values(), *_if_any(key)], value)
        return family

    def _counters(self, counts: Mapping[str, int]) -> Iterator[Metric]:
        """One metric per counter; a labelled one has a sample per label value, without the sum."""
        for family in families():
            text = _since_start(family.text)
            if not family.label:
                yield self._counter(family.name, text, counts[family.name])
                continue
            labels = [*self._labels, family.label]
            metric = CounterMetricFamily(PREFIX + family.name, text, labels=labels)
            prefix = f"{family.name}."
            for name, count in counts.items():
                if name.startswith(prefix):
                    metric.add_metric([*self._labels.values(), name.removeprefix(prefix)], count)
            yield metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _load_seconds(self, pool: PoolState) -> Metric:
        family = HistogramMetricFamily(
            PREFIX + LOAD_SECONDS, LOAD_SECONDS_TEXT, labels=list(self._labels)
        )
        buckets = pool.load_s.cumulative()
        family.add_metric(list(self._labels.values()), buckets, sum_value=pool.load_s.sum_s)
        return family

    def _lora_info(
        self, pool: PoolState, loaded: Iterable[AdapterState], names: Mapping[str, str]
    ) -> Metric:
        on_device = [adapter.id for adapter in loaded if adapter.tier == "device"]
        info = (
            _listed([*pool.running, *on_device], names),
            _listed(pool.waiting, names),
            str(pool.most_in_batch),
        )
        labels = [*self._labels, *LORA_INFO_LABELS]
        family = GaugeMetricFamily(LORA_INFO, LORA_INFO_TEXT, labels=labels)
        family.add_metric([*self._labels.values(), *info], time.time())
        return family

    def _adapter_loaded(self, loaded: Iterable[AdapterState], names: Mapping[str, str]) -> Metric:
        labels = [*self._labels, *ADAPTER_LOADED_LABELS]
        family = GaugeMetricFamily(ADAPTER_LOADED, ADAPTER_LOADED_TEXT, labels=labels)
        for adapter in loaded:
            if adapter.id in names:
                pinned = str(adapter.pinned).lower()
                values = (names[adapter.id], LEVELS[adapter.tier], pinned)
                family.add_metric([*self._labels.values(), *values], 1)
        return family


def _if_any(label: str) -> tuple[str, ...]:
    return (label,) if label else ()


def _since_start(text: str) -> str:
    return f"{text}, since the start."


def _first_loaded(adapters: Iterable[AdapterState]) -> list[AdapterState]:
    """The ``MOST_LISTED`` adapters to list, most wanted first."""
    return heapq.nlargest(
        MOST_LISTED,
        (adapter for adapter in adapters if adapter.tier in LEVELS),
        key=lambda adapter: (adapter.tier == "device", adapter.last_used_s or 0.0),
    )


def _listed(adapter_ids: Iterable[str], names: Mapping[str, str]) -> str:
    listed = {names[adapter_id] for adapter_id in adapter_ids if adapter_id in names}
    return ",".join(sorted(listed))
