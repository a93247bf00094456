"""Makes elora.json, the Grafana dashboard, again.

    python docs/grafana/make.py

A row of the dashboard is a list of panels below; what they have in common is put in here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("elora.json")
WIDTH, HEIGHT = 24, 8  # of the grid, and of a row in it
SOURCE = {"type": "prometheus", "uid": "${source}"}
OF_MODEL = 'model_name=~"$model"'

Panel = dict[str, Any]


def chart(
    title: str,
    text: str,
    lines: Mapping[str, str],
    *,
    unit: str = "short",
    stacked: bool = False,
) -> Panel:
    """Lines over time: PromQL by legend, in which MODEL stands for the labels to choose by."""
    custom = {"fillOpacity": 40 if stacked else 8, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "targets": targets(lines),
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    }


def heatmap(title: str, text: str, metric: str) -> Panel:
    """A histogram's buckets over time."""
    query = f"sum by (le) (increase({metric}_bucket{{MODEL}}[$__rate_interval]))"
    (target,) = targets({"{{le}}": query})
    return {
        "type": "heatmap",
        "title": title,
        "description": text,
        "targets": [{**target, "format": "heatmap"}],
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": "s"},
            "cellGap": 1,
            "tooltip": {"mode": "single", "yHistogram": False},
        },
    }


def table(title: str, text: str, query: str) -> Panel:
    """The labels of a metric as of now."""
    (target,) = targets({"": query})
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    return {
        "type": "table",
        "title": title,
        "description": text,
        "targets": [{**target, "format": "table", "instant": True}],
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True},
        "transformations": [{"id": "organize", "options": {"excludeByName": hidden}}],
    }


def targets(lines: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": query.replace("MODEL", OF_MODEL),
            "legendFormat": legend,
        }
        for i, (legend, query) in enumerate(lines.items())
    ]


def rate(metric: str) -> str:
    return f"sum(rate({metric}_total{{MODEL}}[$__rate_interval]))"


def quantiles(metric: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate({metric}_bucket{{MODEL}}[$__rate_interval]))"
    return {f"P{q}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}


def elora_rates(**metrics: str) -> dict[str, str]:
    """Per second, by legend."""
    return {
        legend.replace("_", " "): rate(f"sglang:elora_{metric}")
        for legend, metric in metrics.items()
    }


def elora_shares(metric: str, label: str) -> dict[str, str]:
    """Parts of a count per second, as shares of all of them."""
    return {
        f"{{{{{label}}}}}": f"{rates_by(metric, label)} / scalar({rate(f'sglang:elora_{metric}')})"
    }


def rates_by(metric: str, label: str) -> str:
    return f"sum by ({label}) (rate(sglang:elora_{metric}_total{{MODEL}}[$__rate_interval]))"


ROWS: list[list[Panel]] = [
    [
        chart(
            "Time to first token",
            "SGLang's own, over all requests.",
            quantiles("sglang:time_to_first_token_seconds"),
            unit="s",
        ),
        chart(
            "Requests",
            "SGLang's own.",
            {
                "running": "sum(sglang:num_running_reqs{MODEL})",
                "queued": "sum(sglang:num_queue_reqs{MODEL})",
            },
        ),
        chart(
            "Prompt tokens found, by where",
            "SGLang's own: share of the prompts that did not have to be computed.",
            {
                "{{cache_source}}": "sum by (cache_source) "
                "(rate(sglang:cached_tokens_total{MODEL}[$__rate_interval])) "
                "/ scalar(sum(rate(sglang:prompt_tokens_total{MODEL}[$__rate_interval])))"
            },
            unit="percentunit",
            stacked=True,
        ),
    ],
    [
        chart(
            "Adapters found, by where",
            "Where requests found their adapter when they came to the scheduler.",
            elora_shares("adapter_lookups", "tier"),
            unit="percentunit",
            stacked=True,
        ),
        chart(
            "Prompt tokens, by where their KV was",
            "When the request was taken into a batch; the rest was computed.",
            elora_shares("prompt_tokens", "source"),
            unit="percentunit",
            stacked=True,
        ),
        chart(
            "KV evicted, tokens per second",
            "Room: for who waits; ahead of a load; told: by an order; unloaded with its adapter.",
            {"{{reason}}": rates_by("kv_slots_evicted", "reason")},
            stacked=True,
        ),
    ],
    [
        chart(
            "Pool by use",
            "Slots of the one pool, of all replicas.",
            {"{{use}}": "sum by (use) (sglang:elora_pool_slots{MODEL})"},
            stacked=True,
        ),
        chart(
            "Adapters by tier",
            "Where their weights are.",
            {"{{tier}}": "sum by (tier) (sglang:elora_adapters{MODEL})"},
            stacked=True,
        ),
        chart(
            "Host tier",
            "Bytes of adapters in host memory.",
            {"adapters": "sum(sglang:elora_host_adapter_bytes{MODEL})"},
            unit="bytes",
        ),
    ],
    [
        heatmap(
            "Seconds that a load took",
            "From the start of an adapter's copy until it is known to be there.",
            "sglang:elora_adapter_load_seconds",
        ),
        chart(
            "Seconds that a load took, quantiles",
            "The same.",
            quantiles("sglang:elora_adapter_load_seconds"),
            unit="s",
        ),
        chart(
            "Adapters per second",
            "Churn: loads within 10 s of the eviction.",
            {
                **elora_rates(loads="adapter_loads", churn="adapter_churn"),
                "evictions, {{reason}}": rates_by("adapter_evictions", "reason"),
            },
        ),
    ],
    [
        chart(
            "Waiting for adapters and prompts",
            "Requests per second that waited for their adapter, or for another request to compute "
            "the prompt that they share.",
            elora_rates(adapter="requests_waited_for_adapter", prompt="requests_waited_for_prompt"),
        ),
        chart(
            "Mean wait for an adapter",
            "Of the requests that waited.",
            {
                "mean": f"{rate('sglang:elora_ms_waited_for_adapter')} "
                f"/ {rate('sglang:elora_requests_waited_for_adapter')}"
            },
            unit="ms",
        ),
        table(
            "Adapters on the device and of waiting requests",
            "What the Gateway API inference extension routes by.",
            "sglang:lora_requests_info{MODEL}",
        ),
        chart(
            "Servers that have an adapter on the device",
            "The 20 adapters that most servers have.",
            {
                "{{adapter_name}}": "topk(20, count by (adapter_name) "
                '(sglang:lora_adapter_loaded{level=~"gpu",MODEL}))'
            },
        ),
    ],
    [
        chart(
            "KV moved or shared, tokens per second",
            "Between device and host; found by activated LoRAs as KV of the base model.",
            elora_rates(
                to_host="kv_slots_to_host", from_host="kv_slots_from_host", shared="shared_tokens"
            ),
        ),
        chart(
            "Prefetched, slots per second",
            "What came back without being asked for, and what became of it.",
            elora_rates(
                prefetched="prefetched_slots",
                used="prefetched_slots_used",
                wasted="prefetched_slots_wasted",
            ),
        ),
        chart(
            "KV on the host",
            "In tokens.",
            {"tokens": "sum(sglang:elora_host_kv_tokens{MODEL})"},
        ),
    ],
    [
        chart(
            "Hints per second",
            "Sent by the tokenizer process; late: the request was there already.",
            elora_rates(
                sent="hints_sent", used="hints_used", late="hints_late", dropped="hints_dropped"
            ),
        ),
        chart(
            "Hints not sent, per second",
            "Repeated: the adapter was announced a moment ago. Over rate: too many in a second.",
            elora_rates(repeated="hints_repeated", over_rate="hints_over_rate"),
        ),
        chart(
            "Sessions and pinned adapters",
            "Sessions that are not over; adapters pinned by orders, by leases and from the start.",
            {
                "sessions": "sum(sglang:elora_sessions{MODEL})",
                "pinned": "sum(sglang:elora_pinned_adapters{MODEL})",
            },
        ),
        chart(
            "Faults per second",
            "None of these should be.",
            elora_rates(
                requests_failed="requests_failed",
                copies_failed="adapter_copies_failed",
                reads_failed="adapter_reads_failed",
                messages_dropped="messages_dropped",
            ),
        ),
    ],
]


def variable(name: str, label: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "label": label, "hide": 0, **more}


def dashboard() -> dict[str, Any]:
    panels = []
    for row, across in enumerate(ROWS):
        width = WIDTH // len(across)
        for column, panel in enumerate(across):
            grid = {"h": HEIGHT, "w": width, "x": column * width, "y": row * HEIGHT}
            panels.append({"id": len(panels) + 1, "datasource": SOURCE, "gridPos": grid, **panel})
    models = "label_values(sglang:elora_pool_slots, model_name)"
    return {
        "uid": "sglang-elora",
        "title": "ELORA: adapters and KV in one cache",
        "tags": ["sglang", "lora"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                variable("source", "Data source", type="datasource", query="prometheus"),
                variable(
                    "model",
                    "Model",
                    type="query",
                    datasource=SOURCE,
                    query={"query": models, "refId": "models"},
                    refresh=2,
                    multi=True,
                    includeAll=True,
                    allValue=".*",
                ),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n")
