"""Measurement of device time without host overhead, and of the bandwidths for comparison."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.kernels.shapes import ROOT

ROUNDS = 12
ROUND_S = 1.5e-3  # of device work per sample, at least


def facts() -> dict[str, Any]:
    """Facts of the machine and versions, as far as available."""

    def output_of(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
        except OSError as error:
            return str(error)
        return done.stdout.strip() or done.stderr.strip()

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: version_of(package) for package in ("torch", "triton", "sglang")},
        "commit": output_of("git", "describe", "--always", "--dirty"),
    }


class Timer:
    """Replays a CUDA graph of some work; a sample is the mean over a round, in seconds.

    Args:
        work: Launches kernels, the same at every call.
        units: Number of timed units in one call of ``work``; samples are per unit.
    """

    def __init__(self, work: Callable[[], Any], units: int = 1) -> None:
        self.units = units
        self.samples: list[float] = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()
        self.repeats = 1
        once = self._round()
        self.repeats = max(1, min(2000, round(ROUND_S / max(once, 1e-7))))

    def _round(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.repeats

    def sample(self) -> None:
        self.samples.append(self._round() / self.units)


def interleaved(timers: Mapping[str, Timer], rounds: int = ROUNDS) -> dict[str, Any]:
    """Each timer once per round, in turn: samples, median, p20 and p80 in microseconds."""
    for _ in range(rounds):
        for timer in timers.values():
            timer.sample()
    return {name: summary(timer.samples) for name, timer in timers.items()}


def summary(samples: list[float]) -> dict[str, Any]:
    microseconds = [sample * 1e6 for sample in samples]
    fifths = statistics.quantiles(microseconds, n=5)
    return {
        "median_us": statistics.median(microseconds),
        "p20_us": fifths[0],
        "p80_us": fifths[3],
        "samples_us": microseconds,
    }


def event_samples(work: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Samples in seconds of work without a graph, for which launch overhead is negligible."""
    samples = []
    for i in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= 2:
            samples.append(begin.elapsed_time(end) / 1e3)
    return samples


def bandwidths() -> dict[str, Any]:
    """Bytes per second: copies on the device (read and written), and the link, pinned memory."""
    size = 2**30
    here, there = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    part = here[: size // 4]
    measured = {
        "device": (2 * size, lambda: there.copy_(here)),
        "host_to_device": (size // 4, lambda: part.copy_(host, non_blocking=True)),
        "device_to_host": (size // 4, lambda: host.copy_(part, non_blocking=True)),
    }
    result = {}
    for name, (num_bytes, work) in measured.items():
        rates = [num_bytes / seconds for seconds in event_samples(work)]
        result[name] = {"bytes_per_s": statistics.median(rates), "samples": rates}
    return result
