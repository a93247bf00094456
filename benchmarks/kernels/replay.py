"""Checks of CUDA graphs of the kernels, replayed with other adapters, ranks, experts, and fewer or
no rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.bench_both import TOLERANCE
from benchmarks.kernels.bench_routed_tiles import WAYS, Way, add_routes
from benchmarks.kernels.expert_world import InTorch, groups_of
from benchmarks.kernels.shapes import EXPERT_SLOT_ELEMS, EXPERTS, EXPERTS_PER_ROW, MODULES, Case
from benchmarks.kernels.world import CaseWorld, expected, input_std
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


def batches(num_adapters: int, num_rows: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Batches of at most ``num_rows`` rows: a name, the adapters, and each row's adapter or -1."""
    all_adapters = list(range(num_adapters))
    for name, adapters in {
        "all": all_adapters,
        "the last one": all_adapters[-1:],
        "none": [],
        "reversed": all_adapters[::-1],
        "few rows": all_adapters[:2],
    }.items():
        used = num_rows // 2 if name == "few rows" else num_rows
        owners = [adapters[row % len(adapters)] if adapters else -1 for row in range(used)]
        yield name, adapters, owners


def load(
    tables: BatchTables, world: CaseWorld, adapters: Sequence[int], owners: Sequence[int]
) -> None:
    """Write a batch of scattered adapters to the tables. ``owners``: adapter of each row, or -1."""
    names = tuple(world.modules)
    records = [world.scattered[i].record(names) for i in adapters]
    stacked = np.stack(records) if records else np.empty((0, record_ints(len(names))), np.int32)
    segments = [(adapters.index(owner) if owner >= 0 else -1, 1) for owner in owners]
    tables.load(Batch(stacked, segments))


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
    for name, adapters, owners in batches(len(whole.scattered), num_rows):
        load(tables, whole, adapters, owners)
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
        free = torch.tensor([row >= len(owners) or owners[row] < 0 for row in range(num_rows)])
        close = torch.isclose(output.float(), truth, **TOLERANCE)
        rows.append(
            {
                "batch": name,
                "wrong": float((~close).float().mean()),
                "untouched_rows_equal": torch.equal(output[free], base[free]),
            }
        )
    return rows


def check_experts(
    device: torch.device,
    shapes: tuple[ModuleShape, ...] = EXPERTS,
    num_rows: int = 64,
    experts_per_row: int = EXPERTS_PER_ROW,
) -> list[dict[str, Any]]:
    """As ``check``, for ``routed_tiles`` and the experts' modules, with each way to cut routes."""
    case = Case("decode", num_rows, min(8, num_rows), "mixed")
    world = CaseWorld.build(case, device, shapes, EXPERT_SLOT_ELEMS)
    return [
        {"way": way.name, "module": shape.name, **row}
        for way in WAYS
        for shape in shapes
        for row in _replayed(world, way, shape, experts_per_row, shape is shapes[0])
    ]


def _replayed(
    world: CaseWorld, way: Way, shape: ModuleShape, experts_per_row: int, shares_inputs: bool
) -> Iterator[dict[str, Any]]:
    """One row per batch, whose rows have other experts than those of the batch before."""
    device, num_rows = world.planes.device, world.case.num_rows
    tables = BatchTables(
        device,
        num_modules=len(world.modules),
        max_rows=num_rows,
        max_adapters=num_rows,
        tile_rows=way.tile_rows,
        has_experts=True,
    )
    num_routes, num_experts = num_rows * experts_per_row, shape.num_experts
    per_input = experts_per_row if shares_inputs else 1
    generator = torch.Generator(device).manual_seed(0)
    make: dict[str, Any] = {"generator": generator, "device": device}
    x = torch.randn(num_routes // per_input, shape.in_features, **make)
    x = (x * input_std(shape, world.case)).bfloat16()
    base = torch.randn(num_routes, sum(shape.out_features), **make).bfloat16()
    output = base.clone()
    ids = torch.full((num_rows, experts_per_row), -1, dtype=torch.int32, device=device)

    def work() -> None:
        tiles = way.tiles(world, tables, ids)
        add_routes(world, 0, shape, tiles, x, output, MAX_RANK)

    replay = captured(work)  # the tables hold nothing yet
    for name, adapters, owners in batches(len(world.scattered), num_rows):
        load(tables, world, adapters, owners)
        # Each row's experts are distinct; one of them is dropped.
        order = torch.rand(num_rows, num_experts, **make).argsort(dim=1)
        ids.copy_(order[:, :experts_per_row])
        ids[num_rows // 2, 0] = -1
        output.copy_(base)
        replay()
        groups = groups_of(owners, ids[: len(owners)], num_experts)
        truth = InTorch(world, 0, shape, groups, per_input).add(x, base.float())
        close = torch.isclose(output.float(), truth, **TOLERANCE)
        free = torch.ones(num_routes, dtype=torch.bool, device=device)
        for group in groups:
            free[group.routes] = False
        yield {
            "batch": name,
            "wrong": float((~close).float().mean()),
            "untouched_rows_equal": torch.equal(output[free], base[free]),
        }
