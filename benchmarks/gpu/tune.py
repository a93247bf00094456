"""Search for launch configurations of the LoRA kernels for this GPU, in one call.

    python -m benchmarks.gpu.tune --out OUT_DIR [--budget-s 560] [--dry-run]

Writes OUT_DIR/<GPU>.json in the format of kernels/launch_configs/default.json, after each shape:
the fastest configuration among those with the default's results. Copy it to
kernels/launch_configs/. Candidates of one shape are timed alternately. Samples are written to
OUT_DIR/tuning.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"
import_module("benchmarks.kernels.shapes")  # makes sglang_elora importable in a bare checkout

import torch  # noqa: E402

from benchmarks.kernels.bench_both import TOLERANCE  # noqa: E402
from benchmarks.kernels.shapes import MODULES, Case  # noqa: E402
from benchmarks.kernels.timing import Timer, facts, interleaved  # noqa: E402
from benchmarks.kernels.world import CaseWorld, Ours  # noqa: E402
from sglang_elora.kernels import ExpandConfig, ShrinkConfig  # noqa: E402
from sglang_elora.kernels.launch_configs import file_name  # noqa: E402
from sglang_elora.pages import ModuleShape  # noqa: E402

# Tiles come from rows: in decode one per adapter, in prefill 64 rows each.
CASES = (
    *(Case("decode", n, n, "16") for n in (64, 8, 32, 1)),
    Case("decode", 64, 64, "64"),
    *(Case("prefill", n, min(n // 64, 8), "16") for n in (8192, 2048, 512)),
)
TINY = (ModuleShape("o_proj", 128, (96,)),)


def shrink_candidates(tile_rows: int) -> Iterator[ShrinkConfig]:
    if tile_rows == 16:
        splits: tuple[int, ...] = (1, 2, 4, 8, 16)
        shapes = itertools.product((16, 32), (128, 256), (1, 2), splits, (4,), (6, 8))
    else:
        shapes = itertools.product((32, 64), (64, 128), (1,), (1, 2, 4), (4, 8), (4, 6))
    for block_n, block_k, lanes, splits_, warps, stages in shapes:
        most = 256 if tile_rows == 16 else 1024
        yield ShrinkConfig(block_n, block_k, lanes, splits_, most, warps, stages)


def expand_candidates(tile_rows: int) -> Iterator[ExpandConfig]:
    most = 256 if tile_rows == 16 else 1024
    for block_n, block_r, warps, stages in itertools.product(
        (64, 128, 256, 512), (16, 32), (4, 8), (2, 3)
    ):
        if tile_rows * block_n <= 16384:
            yield ExpandConfig(block_n, block_r, most, warps, stages)


def best(
    ours: Ours, half: str, candidates: Iterator[Any], x: torch.Tensor, output: torch.Tensor
) -> dict[str, Any]:
    """The fastest candidate that computes what the default one does, and all samples."""
    layers = range(ours.world.num_layers)
    default = ours.shrink_config if half == "shrink" else ours.expand_config

    def result_of(config: Any, layer: int) -> torch.Tensor:
        if half == "shrink":
            ours.shrink_config = config
            return ours.shrink(layer, x).sum(dim=0)
        ours.expand_config = config
        return ours.expand(layer, inner, output.clone())

    def work_of(config: Any) -> Any:
        def work() -> None:
            for layer in layers:
                if half == "shrink":
                    ours.shrink_config = config
                    ours.shrink(layer, x)
                else:
                    ours.expand_config = config
                    ours.expand(layer, inner, output)

        return work

    inner = ours.shrink(0, x)
    rank = min(ours.world.case.ranks) * len(ours.module.out_features)
    truth = result_of(default, 0)[:, :rank]  # undefined beyond an adapter's rank
    timers, refused = {}, []
    for config in candidates:
        try:
            close = torch.allclose(result_of(config, 0)[:, :rank], truth, **TOLERANCE)
        except Exception as error:  # noqa: BLE001  does not compile, or too much memory: not a candidate
            refused.append([asdict(config), repr(error)[:200]])
            continue
        if not close:
            refused.append([asdict(config), "another result"])
        elif DRY_RUN:
            timers[config] = None
        else:
            timers[config] = Timer(work_of(config), len(layers))
    if DRY_RUN:
        return {"launch": asdict(next(iter(timers))), "times": [], "refused": refused}
    times = interleaved({config: timers[config] for config in timers}, rounds=5)  # type: ignore[misc]
    fastest = min(times, key=lambda config: times[config]["median_us"])
    rows = [[asdict(config), row] for config, row in times.items()]  # type: ignore[call-overload]
    return {"launch": asdict(fastest), "times": rows, "refused": refused}  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=560.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not DRY_RUN and not torch.cuda.is_available():
        print("needs a GPU (or --dry-run)")
        raise SystemExit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if DRY_RUN else "cuda")
    end = time.monotonic() + options.budget_s
    entries: dict[str, list[Any]] = {"shrink": [], "expand": []}
    log: dict[str, Any] = {"machine": facts(), "shapes": []}
    todo = [(case, shape) for case in CASES for shape in MODULES]
    if DRY_RUN:
        todo = [(Case("decode", 2, 2, "16"), TINY[0]), (Case("prefill", 64, 1, "16"), TINY[0])]
    for case, shape in todo:
        if time.monotonic() > end:
            log.setdefault("left_out", []).append([case.name, shape.name])
            continue
        world = CaseWorld.build(case, device, TINY if DRY_RUN else MODULES)
        ours = Ours(world, shape, world.scattered)
        x, output = world.inputs(shape)
        rows, tiles = ours.tables.tile_rows, ours.tables.num_tiles
        for half, candidates, features in (
            ("shrink", shrink_candidates(rows), shape.in_features),
            ("expand", expand_candidates(rows), sum(shape.out_features)),
        ):
            few = itertools.islice(candidates, 3) if DRY_RUN else candidates
            found = best(Ours(world, shape, world.scattered), half, few, x, output)
            key = {"tile_rows": rows, "num_tiles": tiles, "features": features}
            if key not in [entry["shape"] for entry in entries[half]]:
                entries[half].append({"shape": key, "launch": found["launch"]})
            log["shapes"].append({"case": case.name, "module": shape.name, "half": half, **found})
        (options.out / file_name(device)).write_text(json.dumps(entries, indent=1) + "\n")
        (options.out / "tuning.json").write_text(json.dumps(log) + "\n")
        print(case.name, shape.name, entries["shrink"][-1]["launch"], flush=True)


if __name__ == "__main__":
    main()
