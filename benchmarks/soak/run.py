"""Soak test: mixed traffic for an hour, to detect growth of a server's memory and other resources.

    python -m benchmarks.soak.run [--minutes 60] [--out FOLDER]

One server with --elora, a host tier for KV and a pool that holds a quarter of the adapters and KV
of a trace. The trace is replayed repeatedly, 8 sessions at a time, with session names and hints for
their next turns. In between: streams that are cut off or aborted, adapters loaded under new names,
used and unloaded, adapters that cannot be loaded, malformed requests, and a flush per round. Each
answer must equal the first round's. ``samples.json.gz`` and ``soak.png`` are written to FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import httpx  # noqa: E402
import psutil  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.testbed.server import ServerProcess  # noqa: E402
from tests.harness.bad_adapters import make_bad_adapters  # noqa: E402
from tests.harness.disturbances import reload_copies  # noqa: E402
from tests.harness.pressure import (  # noqa: E402
    PRESSURE_SPECS,
    OnRecord,
    Record,
    make_model,
    make_trace,
    pool_tokens,
    run_trace,
)
from tests.harness.server_flags import HOST_TIER, server_flags  # noqa: E402

TRACE = make_trace(num_requests=150)
SAMPLE_EVERY_S = 5.0
MALFORMED: Sequence[dict[str, Any]] = (
    {"input_ids": [5, 6], "lora_path": ["a00-r1"]},
    {"input_ids": [5, -6]},
    {"input_ids": [5, 6], "lora_path": "nobody"},
    {"input_ids": [5, 6], "sampling_params": {"top_p": 7}},
    {"input_ids": list(range(3, 1003)) * 10},
    {"text": "x", "session_id": "s" * 5000},
)
"""Bodies of /generate requests that must be answered with HTTP 400."""
QUANTITIES = ("rss_mb", "descriptors", "threads", "shm_mb", "log_kb_per_min", "adapters_known")

Sample = dict[str, float]


def disturb(adapters: Mapping[str, Path], broken: Sequence[Path], counts: Counter[str]) -> OnRecord:
    """Callback that disturbs the server between a turn's answer and the session's next turn."""
    reload, numbers = reload_copies(adapters), itertools.count(1)
    malformed, unloadable = itertools.cycle(MALFORMED), itertools.cycle(broken)

    async def disturbed(http: httpx.AsyncClient, record: Record) -> None:
        number = next(numbers)
        await reload(http, record)
        if number % 3 == 0:
            answer = await http.post("/generate", json=next(malformed))
            counts[f"malformed: {answer.status_code}"] += 1
        if number % 11 == 0:
            body = {"lora_name": f"broken-{number}", "lora_path": str(next(unloadable))}
            answer = await http.post("/load_lora_adapter", json=body)
            counts[f"broken adapter: {answer.status_code}"] += 1

    return disturbed


def sample(server: ServerProcess, since: float) -> Sample:
    """Current resource use of all processes of the server."""
    leader, held = psutil.Process(server.pid), Counter[str]()
    for process in [leader, *leader.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # some run for a moment only
            rss, descriptors = process.memory_info().rss, process.num_fds()
            held.update(rss=rss, descriptors=descriptors, threads=process.num_threads())
    shared = sum(entry.stat().st_size for entry in os.scandir("/dev/shm") if entry.is_file())
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        state = http.get("/elora/state").json()
    return {
        "minute": (time.monotonic() - since) / 60,
        "rss_mb": held["rss"] / 1e6,
        "descriptors": held["descriptors"],
        "threads": held["threads"],
        "shm_mb": shared / 1e6,
        "log_kb": server.log_path.stat().st_size / 1e3,
        "adapters_known": len(state["adapters"]),
    }


def soak(
    server: ServerProcess, minutes: float, on_record: OnRecord, counts: Counter[str]
) -> list[Sample]:
    """Replay the trace until the time is over; returns a sample every few seconds."""
    begun, samples, is_over = time.monotonic(), [], threading.Event()

    def take_samples() -> None:
        while not is_over.wait(SAMPLE_EVERY_S):
            samples.append(sample(server, begun))

    sampler = threading.Thread(target=take_samples)
    sampler.start()
    expected: dict[tuple[int, int], tuple[int, ...]] = {}
    try:
        while time.monotonic() - begun < 60 * minutes:
            records = run_trace(
                server.url,
                TRACE,
                concurrency=8,
                abort_every=5,
                names_sessions=True,
                on_record=on_record,
            )
            outputs = {record.key: record.output for record in records}
            expected = expected or outputs
            counts["rounds"] += 1
            counts["answers"] += len(records)
            counts["errors"] += sum(record.error is not None for record in records)
            for record in records:
                if record.error is not None:
                    print(record.error, flush=True)
            counts["other answers"] += sum(outputs.get(key) != expected[key] for key in expected)
            counts["aborted"] += sum(record.num_aborted for record in records)
            flush = httpx.post(f"{server.url}/flush_cache?timeout=30", trust_env=False)
            counts[f"flush: {flush.status_code}"] += 1
            print(f"{(time.monotonic() - begun) / 60:5.1f} min {dict(counts)}", flush=True)
    finally:
        is_over.set()
        sampler.join()
    for before, after in itertools.pairwise(samples):
        passed = after["minute"] - before["minute"]
        after["log_kb_per_min"] = (after["log_kb"] - before["log_kb"]) / passed
    return samples[1:]


def growth(samples: Sequence[Sample], quantity: str) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return (
        statistics.median(each[quantity] for each in second),
        statistics.median(each[quantity] for each in last),
    )


def plot(samples: Sequence[Sample], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(QUANTITIES), 1, sharex=True, figsize=(8, 12))
    for each, quantity in zip(axes, QUANTITIES, strict=True):
        each.plot([s["minute"] for s in samples], [s[quantity] for s in samples], linewidth=1)
        each.set_ylabel(quantity)
        each.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        model = make_model(folder)
        broken = list(make_bad_adapters(model.adapters["a04-r8"], folder / "bad").values())
        flags = [
            *("--elora", "--elora-check", *server_flags(model.checkpoint)),
            *(*HOST_TIER, "write_back"),
            *("--max-total-tokens", str(pool_tokens(PRESSURE_SPECS, TRACE, 0.25))),
            *("--context-length", "4096"),
            *("--lora-paths", *(f"{name}={path}" for name, path in model.adapters.items())),
        ]
        with ServerProcess(flags, log_path=folder / "server.log") as server:
            on_record = disturb(model.adapters, broken, counts)
            try:
                samples = soak(server, options.minutes, on_record, counts)
            except BaseException:
                print(server.log_tail())
                raise
    for quantity in QUANTITIES:
        second, last = growth(samples, quantity)
        print(f"{quantity}: {second:.1f} in the second quarter, {last:.1f} in the last")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = {**machine(), "counts": counts, "samples": samples}
        with gzip.open(options.out / "samples.json.gz", "wt") as file:
            json.dump(rows, file)
        plot(samples, options.out / "soak.png")


if __name__ == "__main__":
    main()
