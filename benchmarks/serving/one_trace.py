"""Flags of benchmarks that replay one trace of a workload in turns."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from sglang_elora.bench.servers import EmulatedLink
from sglang_elora.workloads import TURNS_PER_S, WORKLOADS, Trace, make_trace

NUM_ADAPTERS = 64


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--workload", choices=WORKLOADS, default="chat")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--link", type=Path, help="a calibration; none by default")
    parser.add_argument("--out", type=Path, required=True)


def trace_of(options: Namespace) -> Trace:
    return make_trace(
        replace(WORKLOADS[options.workload], num_adapters=NUM_ADAPTERS),
        turns_per_s=options.load * TURNS_PER_S[options.workload],
        duration_s=options.duration,
        seed=0,
    )


def link_of(options: Namespace) -> EmulatedLink | None:
    return None if options.link is None else EmulatedLink.load(options.link)
