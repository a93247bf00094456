"""Fit of the simulator's calibration of the CPU server to the runs in results/serving.

    python benchmarks/results/rows.py unpack serving
    python -m benchmarks.sim.fit

The time from an answer's first token to its last consists of its decode steps and of prefill
batches between them. Both are fitted together, with absolute errors. Batches are recognised by
simultaneous first tokens; the time of stock's blocking loads before them, which follows from the
order of requests, is subtracted. TTFT of single requests on an idle server, measured by
calibrate.py, is added, because it separates the costs per token and per batch. Stock and ELORA
have different LoRA kernels on a CPU, so each has its own file. Sizes and link are taken from the
runs' files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sglang_elora.bench.record import Record
from sglang_elora.sim import Calibration

ROOT = Path(__file__).resolve().parents[2]

SERVING = ROOT / "benchmarks/results/serving"
RUNS = {
    "cpu": ("load-0.7/*elora_elora-3.json.gz", "load-1/*elora_*-2.json.gz"),
    "cpu-stock": ("load-0.7/*stock-*-3.json.gz", "load-1/*stock-*-2.json.gz"),
}
"""Patterns of the run files to fit: runs of the last commits in which no side was overloaded."""

TOGETHER_S = 0.004
LAYERS = 4
FEATURES = ("steps", "requests", "context", "batches", "new", "attended")


def runs(patterns: Sequence[str]) -> list[Path]:
    """The files of runs that match, by name.

    Raises:
        SystemExit: A pattern has no file; the rows are packed in a clone.
    """
    found = {pattern: sorted(SERVING.glob(pattern)) for pattern in patterns}
    for pattern, paths in found.items():
        if not paths:
            raise SystemExit(
                f"no {SERVING.relative_to(ROOT) / pattern}: raw rows are packed, "
                "run `python benchmarks/results/rows.py unpack serving` first"
            )
    return sorted(path for paths in found.values() for path in paths)


def read(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    row["records"] = list(map(Record.from_row, row["records"]))
    return row


def observations(row: Mapping[str, Any]) -> list[tuple[list[float], float]]:
    """(what was done from the first token to the last, how long it took) of each answer."""
    records: list[Record] = row["records"]
    answered = [(r, r.first_s, r.last_s) for r in records if r.first_s and r.last_s]
    answered.sort(key=lambda answer: answer[1])
    batches: list[list[tuple[Record, float, float]]] = []
    for answer in answered:
        if batches and answer[1] - batches[-1][-1][1] < TOGETHER_S:
            batches[-1].append(answer)
        else:
            batches.append([answer])
    loads_s = stock_loads_s(row, [[record for record, _, _ in batch] for batch in batches])
    found = []
    for record, first_s, last_s in answered:
        took_s, steps = last_s - first_s, len(record.output) - 1
        if steps < 4:
            continue
        requests = context = 0.0
        for other, begin_s, end_s in answered:
            share = max(0.0, min(end_s, last_s) - max(begin_s, first_s)) / took_s
            requests += share
            context += share * (other.num_prompt + len(other.output) / 2)
        inside = [i for i, b in enumerate(batches) if first_s + TOGETHER_S < b[0][1] < last_s]
        between = [batches[i] for i in inside]
        new = attended = 0.0
        for other, _, _ in (answer for batch in between for answer in batch):
            num_new = other.num_prompt - other.num_cached
            new += num_new
            attended += num_new * (other.num_cached + num_new / 2)
        x = [steps, steps * requests, steps * context, len(between), new, attended]
        found.append((x, took_s - sum(loads_s[i] for i in inside)))
    return found


def stock_loads_s(row: Mapping[str, Any], batches: Sequence[Sequence[Record]]) -> list[float]:
    """Seconds of stock's blocking loads before each batch, with LRU eviction of its slots."""
    side, sizes, link = row["side"], row["sizes"], row["link"]
    if not side.startswith("stock"):
        return [0.0] * len(batches)
    num_slots = int(side.partition(":")[2] or 8)
    slots: OrderedDict[str, None] = OrderedDict()
    found = []
    for batch in batches:
        took_s = 0.0
        for adapter in dict.fromkeys(record.adapter for record in batch):
            if adapter not in slots:
                rank = sizes["ranks"][int(adapter[1:]) % len(sizes["ranks"])]
                num_bytes = sizes["largest_adapter_bytes"] * rank / max(sizes["ranks"])
                took_s += num_bytes / (1e9 * float(link["SGLANG_ELORA_LINK_GBYTES_PER_S"]))
                took_s += 8 * LAYERS * 1e-6 * float(link["SGLANG_ELORA_LINK_LATENCY_US"])
            slots[adapter] = None
            slots.move_to_end(adapter)
            if len(slots) > num_slots:
                slots.popitem(last=False)
        found.append(took_s)
    return found


def single_requests() -> list[tuple[list[float], float]]:
    """TTFT on an idle server, by length."""
    samples = json.loads((SERVING / "calibration.json").read_text())["samples_s"]
    return [
        ([0.0, 0.0, 0.0, 1.0, float(length), float(length) ** 2 / 2], seconds)
        for length, found in samples.items()
        for seconds in found
    ]


def fit(found: Sequence[tuple[list[float], float]]) -> tuple[dict[str, float], float]:
    """Seconds per unit of each feature, and the median relative error."""
    single = single_requests()
    x: NDArray[np.float64] = np.array([features for features, _ in (*found, *single)])
    y: NDArray[np.float64] = np.array([seconds for _, seconds in (*found, *single)])
    scale = x.std(axis=0)
    share = np.ones(len(y))
    share[len(found) :] = (len(found) / len(single)) ** 0.5  # both count alike
    weights = share
    for _ in range(10):  # towards least absolute errors
        solved, _ = nnls((x / scale) * weights[:, None], y * weights)
        errors = np.abs(y - x @ (solved / scale))
        weights = share / np.sqrt(np.maximum(errors, np.median(errors)))
    fitted = dict(zip(FEATURES, (solved / scale).tolist(), strict=True))
    return fitted, statistics.median((errors / y)[: len(found)].tolist())


def calibration(name: str, paths: Sequence[Path]) -> Calibration:
    rows = [read(path) for path in paths]
    found = [one for row in rows for one in observations(row)]
    rates, error = fit(found)
    print(json.dumps({"name": name, **rates, "median_error": error}, indent=1))
    sizes, link = rows[0]["sizes"], rows[0]["link"]
    slots = [
        -(-sizes["largest_adapter_bytes"] * rank // max(sizes["ranks"]) // sizes["slot_bytes"])
        for rank in sizes["ranks"]
    ]
    names = ", ".join(path.relative_to(SERVING).as_posix() for path in paths)
    fitted = (
        f"benchmarks/sim/fit.py on {len(found)} answers of {names}, and calibration.json; "
        f"median error {error:.1%}"
    )
    return Calibration(
        name=name,
        sources={
            "batch_s, prefill_*, decode_*": fitted,
            "link_*": "the emulated link of these runs (calibrate.py)",
            "to_host_bytes_per_s": "a memcpy there, which the records do not show: taken as free",
            "*_slots, slot_bytes": "sizes in these runs' files",
            "copies_per_*": "4 layers: stock copies 8 matrices of each, KV goes layer by layer, "
            "an adapter of ours in eight pieces",
            "max_running, prefill_budget": "the runs' --max-running-requests, and SGLang's "
            "default of --max-prefill-tokens",
        },
        batch_s=rates["batches"],
        prefill_token_s=rates["new"],
        prefill_context_s=rates["attended"],
        decode_step_s=rates["steps"],
        decode_request_s=rates["requests"],
        decode_context_s=rates["context"],
        link_bytes_per_s=1e9 * float(link["SGLANG_ELORA_LINK_GBYTES_PER_S"]),
        link_latency_s=1e-6 * float(link["SGLANG_ELORA_LINK_LATENCY_US"]),
        to_host_bytes_per_s=1e12,
        slot_bytes=sizes["slot_bytes"],
        pool_slots=sizes["pool_slots"],
        host_slots=sizes["host_kv_tokens"],
        adapter_slots=tuple(slots),
        split_slot=sizes["largest_adapter_bytes"] // sizes["slot_bytes"],
        copies_per_adapter=8,
        copies_per_adapter_split=8 * LAYERS,
        copies_per_kv_load=LAYERS,
        max_running=32,
        prefill_budget=16384,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    options = parser.parse_args()
    for name, patterns in RUNS.items():
        found = json.dumps(asdict(calibration(name, runs(patterns))), indent=1)
        (options.out / f"{name}.json").write_text(found + "\n")


if __name__ == "__main__":
    main()
