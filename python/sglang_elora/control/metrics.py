"""The mirrored state as Prometheus metrics, next to SGLang's own on ``/metrics``.

They are made in the tokenizer process at each scrape, so that the scheduler writes no metric and a
set of adapters that was running once leaves no series behind.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from sglang_elora.control.state import PoolState, Tier

PREFIX = "sglang:elora_"
LORA_INFO = "sglang:lora_requests_info"
"""What the Gateway API inference extension routes by: its protocol for model servers, as vLLM has
it under ``vllm:lora_requests_info``."""


class StateCollector(Collector):
    """
    Args:
        mirror: Brought up to date before a scrape by whoever serves it.
        names: Of the adapters that are loaded, by id.
        hints: Counts of this process's hints, by what became of them.
        model_name: A label of each metric, as SGLang's have it.
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
        yield self._gauges(
            "pool_slots", "Slots of the KV pool, by what they hold.", "use", pool.uses
        )
        tiers = Counter(adapter.tier for adapter in self._mirror.adapters.values())
        by_tier = {tier: tiers[tier] for tier in get_args(Tier)}
        yield self._gauges("adapters", "Adapters by where their weights are.", "tier", by_tier)
        pinned = sum(adapter.pinned for adapter in self._mirror.adapters.values())
        yield self._gauge("pinned_adapters", "Adapters that are pinned.", pinned)
        yield self._gauge("sessions", "Sessions that are not over.", pool.num_sessions)
        yield self._gauge("host_kv_tokens", "Tokens of KV on the host.", pool.kv_host)
        yield self._gauge(
            "host_adapter_bytes", "Bytes of adapters in host memory.", pool.adapter_host_bytes
        )
        yield from self._counters(pool.counts)
        for name, count in self._hints().items():
            text = f"hints {_in_words(name)} by the tokenizer process, since the start."
            yield self._counter(f"hints_{name}", text, count)
        yield self._load_seconds(pool)
        yield self._lora_info(pool)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family

    def _counters(self, counts: Mapping[str, int]) -> Iterator[Metric]:
        """One per count; of a count with a label each value, and not their sum."""
        for family in families():
            text = f"{family.text}, since the start."
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
            PREFIX + "adapter_load_seconds",
            "From the start of an adapter's copy to the device until it is known to be there.",
            labels=list(self._labels),
        )
        buckets = pool.load_s.cumulative()
        family.add_metric(list(self._labels.values()), buckets, sum_value=pool.load_s.sum_s)
        return family

    def _lora_info(self, pool: PoolState) -> Metric:
        names = self._names()
        info = {
            "running_lora_adapters": _listed(pool.running, names),
            "waiting_lora_adapters": _listed(pool.waiting, names),
            "max_lora": str(pool.most_in_batch),
        }
        family = GaugeMetricFamily(
            LORA_INFO, "Adapters of running and of waiting requests.", labels=[*self._labels, *info]
        )
        family.add_metric([*self._labels.values(), *info.values()], time.time())
        return family


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _listed(adapter_ids: list[str], names: Mapping[str, str]) -> str:
    return ",".join(sorted(names[adapter_id] for adapter_id in adapter_ids if adapter_id in names))
