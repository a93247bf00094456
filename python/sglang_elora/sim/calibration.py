"""Durations and sizes for one machine and model: all constants of the simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

SCALABLE = (
    "batch_s",
    "prefill_token_s",
    "prefill_context_s",
    "decode_step_s",
    "decode_request_s",
    "decode_context_s",
    "link_bytes_per_s",
    "link_latency_s",
    "pool_slots",
    "host_slots",
    "adapter_host_slots",
    "file_bytes_per_s",
)
"""Fields that a sensitivity analysis scales, one at a time."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The cost model of one machine and model. A slot holds one token's KV or as many bytes of an
    adapter.

    A prefill batch takes ``batch_s + sum over requests of new * (prefill_token_s +
    prefill_context_s * (cached + new / 2))``, a decode step ``decode_step_s + requests *
    decode_request_s + tokens in context * decode_context_s``, a transfer to the device of n copies
    ``n * link_latency_s + bytes / link_bytes_per_s``.
    """

    name: str
    sources: Mapping[str, str]  # field -> where its value comes from
    batch_s: float
    prefill_token_s: float
    prefill_context_s: float  # per pair of a new token and a preceding token
    decode_step_s: float
    decode_request_s: float
    decode_context_s: float
    link_bytes_per_s: float
    link_latency_s: float
    to_host_bytes_per_s: float
    slot_bytes: int
    pool_slots: int  # on the device, for adapters and KV together
    host_slots: int  # for KV; adapters are counted in adapter_host_slots
    adapter_slots: tuple[int, ...]  # size by rank; adapter i has entry i modulo the length
    split_slot: int  # pool slots per adapter of a static split: the size of the largest rank
    copies_per_adapter: int
    copies_per_adapter_split: int  # stock copies matrix by matrix
    copies_per_kv_load: int
    max_running: int
    prefill_budget: int  # new tokens per prefill batch
    adapter_host_slots: int = 0  # host memory for adapters; 0: all are in it from the start
    file_bytes_per_s: float = math.inf  # speed of each reader of adapter files

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{field.name} of calibration {self.name} is negative: {value}")
        if max(self.adapter_slots) >= self.pool_slots:
            raise ValueError(
                f"the largest adapter takes {max(self.adapter_slots)} of {self.pool_slots} slots"
            )

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """The calibration in a JSON file; raises ValueError for a missing or unknown field."""
        content: dict[str, Any] = json.loads(path.read_text())
        required = {field.name for field in fields(cls) if field.default is MISSING}
        unknown = content.keys() - {field.name for field in fields(cls)}
        if not required <= content.keys() or unknown:
            wrong = ", ".join(sorted((required - content.keys()) | unknown))
            raise ValueError(f"{path}: missing or unknown: {wrong}")
        return cls(**{**content, "adapter_slots": tuple(content["adapter_slots"])})

    def scaled(self, name: str, factor: float) -> Calibration:
        """A copy with one field of ``SCALABLE`` multiplied by ``factor``."""
        if name not in SCALABLE:
            raise ValueError(f"{name!r} must be one of {', '.join(SCALABLE)}")
        value = getattr(self, name)
        scaled: Any = round(value * factor) if isinstance(value, int) else value * factor
        return replace(self, **{name: scaled})

    def prefill_s(self, num_new: int, num_cached: int) -> float:
        """Seconds of one request's prefill, without the batch's ``batch_s``."""
        context = num_cached + num_new / 2
        return num_new * (self.prefill_token_s + self.prefill_context_s * context)

    def decode_s(self, num_requests: int, num_context: int) -> float:
        requests_s = num_requests * self.decode_request_s
        return self.decode_step_s + requests_s + num_context * self.decode_context_s

    def decode_steps_s(self, steps: int, num_requests: int, num_context: int) -> float:
        """Seconds of ``steps`` decode steps in a row; each adds one token per request."""
        grown = num_requests * steps * (steps - 1) / 2
        return steps * self.decode_s(num_requests, num_context) + grown * self.decode_context_s

    def to_device_s(self, num_slots: int, num_copies: int) -> float:
        return (
            num_copies * self.link_latency_s + num_slots * self.slot_bytes / self.link_bytes_per_s
        )

    def read_s(self, num_slots: int) -> float:
        """Seconds to read an adapter's file."""
        return num_slots * self.slot_bytes / self.file_bytes_per_s

    def to_host_s(self, num_slots: int) -> float:
        return num_slots * self.slot_bytes / self.to_host_bytes_per_s
