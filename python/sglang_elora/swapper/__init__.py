"""Adapters on their way between file, host memory and device. Nothing here imports sglang."""

from __future__ import annotations

__all__ = [
    "MOST_EXPECTED",
    "ORDER_STEPS",
    "AdapterCopy",
    "Copied",
    "Expected",
    "HostTier",
    "HostTierFull",
    "Read",
    "ReadImage",
]

from sglang_elora.swapper.adapter_copy import AdapterCopy, Copied
from sglang_elora.swapper.expected import MOST_EXPECTED, ORDER_STEPS, Expected
from sglang_elora.swapper.host_tier import HostTier, HostTierFull
from sglang_elora.swapper.reading import Read, ReadImage
