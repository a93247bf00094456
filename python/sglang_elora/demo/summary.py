"""Statistics per turn and per adapter, from raw turn records."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import numpy as np

from sglang_elora.demo.loads import AdapterMoves
from sglang_elora.demo.slots import slot_demand
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult
from sglang_elora.testbed.adapters import AdapterSpec


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """Statistics of the n-th turn of all sessions; ``turn`` counts from 0."""

    turn: int
    num_requests: int
    mean_ttft_s: float
    p95_ttft_s: float
    prompt_tokens: int
    cached_tokens: int

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens that came from the cache, 0 to 1."""
        return share(self.cached_tokens, self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """Statistics of one adapter's requests; ``moves`` is None if the server's log has none."""

    spec: AdapterSpec
    num_requests: int
    moves: AdapterMoves | None
    mean_ttft_s: float | None
    cached_share: float


@dataclass(frozen=True, slots=True)
class DemoRun:
    """All measurements of one demo run."""

    specs: Sequence[AdapterSpec]
    results: Sequence[TurnResult]
    moves: Mapping[str, AdapterMoves] | None
    counts: Mapping[str, int]  # of the server, since its start; empty if it reported none
    pool_slots: int  # 0 if the server did not report it
    duration_s: float
    server_command: Sequence[str]

    @property
    def records(self) -> list[TurnRecord]:
        return [result for result in self.results if isinstance(result, TurnRecord)]

    @property
    def failures(self) -> list[TurnFailure]:
        return [result for result in self.results if isinstance(result, TurnFailure)]

    def by_turn(self) -> list[TurnSummary]:
        """Summaries in the order of turns."""
        summaries = []
        for turn in sorted({record.turn for record in self.records}):
            records = [record for record in self.records if record.turn == turn]
            ttfts = [record.ttft_s for record in records]
            summaries.append(
                TurnSummary(
                    turn=turn,
                    num_requests=len(records),
                    mean_ttft_s=fmean(ttfts),
                    p95_ttft_s=float(np.percentile(ttfts, 95)),
                    prompt_tokens=sum(record.prompt_tokens for record in records),
                    cached_tokens=sum(record.cached_tokens for record in records),
                )
            )
        return summaries

    def by_adapter(self) -> list[AdapterSummary]:
        """Summaries in the order of ``specs``, including adapters without requests."""
        summaries = []
        for spec in self.specs:
            records = [record for record in self.records if record.adapter == spec.name]
            summaries.append(
                AdapterSummary(
                    spec=spec,
                    num_requests=len(records),
                    moves=None if self.moves is None else self.moves[spec.name],
                    mean_ttft_s=fmean(r.ttft_s for r in records) if records else None,
                    cached_share=cached_share(records),
                )
            )
        return summaries

    def save(self, path: Path) -> None:
        """Write the raw records, with machine, versions and configuration, as JSON."""
        content = {
            "machine": {
                "system": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "num_cpus": os.cpu_count(),
                "python": platform.python_version(),
                "sglang": _installed_version("sglang"),
                "torch": _installed_version("torch"),
            },
            "server_command": list(self.server_command),
            "duration_s": self.duration_s,
            "adapters": [asdict(spec) for spec in self.specs],
            "adapter_moves": None
            if self.moves is None
            else {name: asdict(moves) for name, moves in self.moves.items()},
            "pool_slots": self.pool_slots,
            "counts": dict(self.counts),
            "computed_for_fixed_slots": asdict(slot_demand(self.records)),
            "turns": [asdict(record) for record in self.records],
            "failures": [asdict(failure) for failure in self.failures],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def cached_share(records: Sequence[TurnRecord]) -> float:
    """Share of the prompt tokens of ``records`` that came from the cache, 0 to 1."""
    return share(sum(r.cached_tokens for r in records), sum(r.prompt_tokens for r in records))


def share(part: int, whole: int) -> float:
    """``part / whole``, or 0 if ``whole`` is 0."""
    return part / whole if whole else 0.0


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
