"""Traces: generated, or read from files of public formats. Uses only the standard library."""

from __future__ import annotations

__all__ = [
    "AGENT",
    "BASE",
    "CHAT",
    "CHECKS",
    "FIRST_TOKEN",
    "FULL_SIZE",
    "GROWS_AT",
    "STOCK_DEFAULT_SLOTS",
    "TRANSLATION",
    "TURNS_PER_S",
    "WORKLOADS",
    "Assignment",
    "Check",
    "Law",
    "Recorded",
    "Rise",
    "Session",
    "Trace",
    "Turn",
    "Workload",
    "adapter_name",
    "azure_functions",
    "azure_llm",
    "conversations",
    "due_s",
    "make_trace",
    "mooncake",
    "popular_adapter",
    "shared_prefix",
    "slora",
]

from sglang_elora.workloads.assignment import Assignment
from sglang_elora.workloads.azure import azure_functions, azure_llm
from sglang_elora.workloads.conversations import conversations
from sglang_elora.workloads.generate import FIRST_TOKEN, adapter_name, make_trace, popular_adapter
from sglang_elora.workloads.mooncake import mooncake
from sglang_elora.workloads.popularity import Law
from sglang_elora.workloads.presets import (
    AGENT,
    CHAT,
    CHECKS,
    FULL_SIZE,
    STOCK_DEFAULT_SLOTS,
    TRANSLATION,
    TURNS_PER_S,
    WORKLOADS,
)
from sglang_elora.workloads.published import shared_prefix, slora
from sglang_elora.workloads.rise import Rise
from sglang_elora.workloads.trace import BASE, Check, Session, Trace, Turn, due_s
from sglang_elora.workloads.workload import GROWS_AT, Recorded, Workload
