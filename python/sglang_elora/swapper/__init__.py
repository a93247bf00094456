"""Adapters on their way between file, host memory and device. Nothing here imports sglang."""

from __future__ import annotations

__all__ = ["AdapterCopy", "Copied", "HostTier", "HostTierFull", "Read"]

from sglang_elora.swapper.adapter_copy import AdapterCopy, Copied
from sglang_elora.swapper.host_tier import HostTier, HostTierFull, Read
