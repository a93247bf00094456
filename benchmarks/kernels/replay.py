"""Check of a CUDA graph of both kernels, replayed with other adapters, ranks, and fewer or no
rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.bench_both import TOLERANCE
from benchmarks.kernels.shapes import MODULES, Case
from benchmarks.kernels.world import CaseWorld, expected
from sglang_elora.kernels import (
    Batch,
    BatchTables,
    expand_config,
    lora_expand,
    lora_shrink,
    record_ints,
    shrink_config,
)
from sglang_elora.pages import ModuleShape

MAX_RANK = 256


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work as a graph; without CUDA, the work itself."""
    if not torch.cuda.is_available():
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def check(
    device: torch.device,
    shapes: tuple[ModuleShape, ...] = MODULES,
    num_rows: int = 64,
    tile_rows: int = 16,
) -> list[dict[str, Any]]:
    """One row per batch that was replayed: the share of wrong elements, and untouched ones."""
    shape = shapes[0]
    whole = CaseWorld.build(Case("decode", num_rows, min(8, num_rows), "mixed"), device, shapes)
    names = tuple(whole.modules)
    tables = BatchTables(
        device,
        num_modules=len(names),
        max_rows=num_rows,
        max_adapters=num_rows,
        tile_rows=tile_rows,
    )
    module, tiles = whole.modules[shape.name], tables.tiles_for(num_rows)
    x, base = whole.inputs(shape)
    output = base.clone()

    def work() -> None:
        inner = lora_shrink(
            x,
            whole.planes.plane(0, 0),
            tables,
            module,
            width=module.inner_width(MAX_RANK),
            num_tiles=tiles,
            config=shrink_config(device, tile_rows, tiles, shape.in_features),
        )
        lora_expand(
            inner,
            whole.planes.plane(-1, 0),
            tables,
            module,
            output,
            num_tiles=tiles,
            config=expand_config(device, tile_rows, tiles, sum(shape.out_features)),
        )

    replay = captured(work)  # the tables hold nothing yet
    rows = []
    count = len(whole.scattered)
    for name, adapters in {
        "all": list(range(count)),
        "the last one": [count - 1],
        "none": [],
        "reversed": list(range(count))[::-1],
        "few rows": [0, 1],
    }.items():
        used = num_rows // 2 if name == "few rows" else num_rows
        owners = [adapters[row % len(adapters)] if adapters else -1 for row in range(used)]
        records = [whole.scattered[i].record(names) for i in adapters]
        stacked = np.stack(records) if records else np.empty((0, record_ints(len(names))), np.int32)
        segments = [(adapters.index(owner) if owner >= 0 else -1, 1) for owner in owners]
        tables.load(Batch(stacked, segments))
        output.copy_(base)
        replay()
        truth = base.float()
        for i in adapters:
            mine = torch.tensor([r for r, owner in enumerate(owners) if owner == i], device=device)
            one = CaseWorld(
                Case("decode", len(mine), 1, "16"),
                1,
                whole.planes,
                whole.modules,
                [whole.layouts[i]],
                [whole.scattered[i]],
                [],
            )
            truth[mine] = expected(one, shape, 0, x[mine], base[mine])
        free = torch.tensor([row >= used or owners[row] < 0 for row in range(num_rows)])
        close = torch.isclose(output.float(), truth, **TOLERANCE)
        rows.append(
            {
                "batch": name,
                "wrong": float((~close).float().mean()),
                "untouched_rows_equal": torch.equal(output[free], base[free]),
            }
        )
    return rows
