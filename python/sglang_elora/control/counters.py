"""Counters of a scheduler process, shown by /server_info, /elora/state and /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from sglang_elora.control.state import Tier


def _zeros(*labels: str) -> Callable[[], dict[str, int]]:
    return lambda: dict.fromkeys(labels, 0)


def _by(label: str, text: str, *, has_total: bool = False) -> dict[str, Any]:
    return {"text": text, "label": label, "has_total": has_total}


@dataclass(slots=True)
class Counters:
    """Counts since the start of the process: events, or slots or tokens if the name says so (one
    slot holds one token's KV). A labelled counter has one count per label value."""

    adapter_loads: int = field(
        default=0, metadata={"text": "Adapters copied from host memory to the device"}
    )
    adapter_slots_from_host: int = field(
        default=0, metadata={"text": "Slots of adapters copied from host memory to the device"}
    )
    adapter_evictions: dict[str, int] = field(
        default_factory=_zeros("capacity", "api", "unload"),
        metadata=_by("reason", "Adapters that left the device", has_total=True),
    )
    adapter_churn: int = field(
        default=0, metadata={"text": "Adapters loaded again within ten seconds of their eviction"}
    )
    adapter_lookups: dict[str, int] = field(
        default_factory=_zeros(*get_args(Tier)),
        metadata=_by("tier", "Requests, by where their adapter was when they arrived"),
    )
    adapter_copies_failed: int = field(
        default=0, metadata={"text": "Copies of adapters to the device that failed"}
    )
    adapter_reads_failed: int = field(
        default=0, metadata={"text": "Files of adapters that could not be read, or had changed"}
    )
    hints: int = field(
        default=0, metadata={"text": "Adapters that hints and orders named and that are expected"}
    )
    hints_dropped: int = field(
        default=0, metadata={"text": "Adapters that hints named and that are unknown, or too many"}
    )
    hints_late: int = field(
        default=0, metadata={"text": "Hints for adapters that a queued request needed already"}
    )
    hints_used: int = field(
        default=0, metadata={"text": "Hints whose adapter a request used while it was expected"}
    )
    kv_slots_copied_ahead: int = field(
        default=0, metadata={"text": "Slots of KV copied to the host before their eviction"}
    )
    kv_slots_evicted: dict[str, int] = field(
        default_factory=_zeros("api", "capacity", "proactive", "unload"),
        metadata=_by("reason", "Slots of KV that left the device", has_total=True),
    )
    kv_slots_from_host: int = field(
        default=0, metadata={"text": "Slots of KV loaded from the host"}
    )
    kv_slots_to_host: int = field(default=0, metadata={"text": "Slots of KV copied to the host"})
    messages_dropped: int = field(
        default=0, metadata={"text": "Messages between the processes that could not be decoded"}
    )
    prefetched_slots: int = field(
        default=0, metadata={"text": "Slots of adapters and KV loaded before a request needed them"}
    )
    prefetched_slots_used: int = field(
        default=0, metadata={"text": "Prefetched slots that a request used"}
    )
    prefetched_slots_wasted: int = field(
        default=0, metadata={"text": "Prefetched slots that were evicted unused"}
    )
    prompt_tokens: dict[str, int] = field(
        default_factory=_zeros("device", "host", "computed"),
        metadata=_by("source", "Tokens of prompts, by where their KV came from"),
    )
    shared_tokens: int = field(
        default=0,
        metadata={
            "text": "Tokens of prompts with an activated LoRA whose KV was that of the base model"
        },
    )
    requests_failed: int = field(
        default=0,
        metadata={"text": "Requests that ended because their adapter could not be loaded"},
    )
    requests_waited_for_prompt: int = field(
        default=0,
        metadata={
            "text": "Requests with an activated LoRA that waited for another one to compute their "
            "prompt"
        },
    )
    requests_waited_for_adapter: int = field(
        default=0, metadata={"text": "Requests that waited for their adapter"}
    )
    ms_waited_for_adapter: int = field(
        default=0, metadata={"text": "Milliseconds that these requests waited"}
    )

    def flat(self) -> dict[str, int]:
        """Counts by name; of a labelled counter each as ``name.value``, and its sum as ``name`` if
        it has a total."""
        found: dict[str, int] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int):
                found[spec.name] = value
                continue
            found |= {f"{spec.name}.{label}": number for label, number in value.items()}
            if spec.metadata["has_total"]:
                found[spec.name] = sum(value.values())
        return found


@dataclass(frozen=True, slots=True)
class Family:
    """A counter as a Prometheus metric. ``label`` is empty for an unlabelled counter."""

    name: str
    text: str
    label: str


def families() -> Iterator[Family]:
    """The metric of each field of ``Counters``."""
    for spec in fields(Counters):
        yield Family(spec.name, spec.metadata["text"], spec.metadata.get("label", ""))
