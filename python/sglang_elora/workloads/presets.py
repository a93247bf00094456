"""Workloads chat, translation and agent, sized for a tiny model on a CPU and for an LLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sglang_elora.workloads.workload import Workload

CHAT = Workload("chat", (60, 180), 110, 14, (4, 8), 20.0, moves=6)
TRANSLATION = Workload(
    "translation", (20, 60), 120, 16, (1, 2), 4.0, moves=32, skew=0.7, active=(29 / 64, 48 / 64)
)
AGENT = Workload("agent", (300, 600), 70, 12, (6, 12), 8.0, moves=4)
WORKLOADS: Mapping[str, Workload] = {w.name: w for w in (CHAT, TRANSLATION, AGENT)}
TURNS_PER_S: Mapping[str, float] = {"chat": 6.0, "translation": 9.0, "agent": 7.0}
"""Rates at which well tuned stock SGLang has a TTFT of about 200 ms on two cores."""

STOCK_DEFAULT_SLOTS = 8
"""Adapter slots of stock SGLang without a flag: the default of ``--max-loras-per-batch``."""

FULL_SIZE: Mapping[str, Workload] = {
    w.name: w
    for w in (
        Workload(
            "chat",
            (150, 450),
            70,
            215,
            (1, 8),
            20.0,
            moves=6,
            user_spread=1.0,
            output_spread=0.8,
            output_limits=(8, 1024),
            max_tokens=8192,
        ),
        Workload(
            "translation",
            (50, 150),
            120,
            120,
            (1, 2),
            4.0,
            moves=32,
            skew=0.7,
            active=(29 / 64, 48 / 64),
            output_limits=(8, 512),
            max_tokens=2048,
        ),
        Workload(
            "agent",
            (750, 1500),
            60,
            60,
            (6, 12),
            8.0,
            moves=4,
            output_limits=(8, 512),
            max_tokens=8192,
        ),
    )
}
"""Workloads for the simulator, with the lengths of real chats. Chat's mean prompt and answer (70
and 215 tokens) are LMSYS-Chat-1M's (Zheng et al., arXiv 2309.11998, table 1: 69.5 and 214.5).
Its turns and spreads, and all of the other two, are our choice, after the CPU presets: system
prompts are 2.5 times as long, as adapters take 2.5 times as many slots."""

CHECKS = replace(FULL_SIZE["chat"], name="checks", num_checks=5)
"""Chats with the base model, each turn of which five adapters check: for the simulator."""
