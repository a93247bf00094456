"""``routed_tiles`` alone, and with both LoRA kernels of each module of a layer of experts.

Every case is timed with each way to cut routes into tiles, so that ``MOST_SINGLE_ROUTES`` and the
rows of a tile can be read from the times. Compared are adapters in contiguous slots, products in
torch for each pair of an adapter and an expert, and the bytes that have to be moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

import torch

from benchmarks.kernels.bench_both import TOLERANCE
from benchmarks.kernels.expert_world import ExpertWorld, InTorch
from benchmarks.kernels.world import CaseWorld
from sglang_elora.kernels import (
    MOST_SINGLE_ROUTES,
    BatchTables,
    RoutedTiles,
    expand_config,
    lora_expand,
    lora_shrink,
    routed_tiles,
    shrink_config,
)
from sglang_elora.pages import ModuleShape

MOST_TIMED_SINGLE = 4096
"""Most routes for which a tile each is timed. Raising it takes longer to measure."""

_MODULE = import_module("sglang_elora.kernels.routed_tiles")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to cut routes into tiles: one each, or groups of at most ``tile_rows`` routes."""

    is_single: bool
    tile_rows: int

    @property
    def name(self) -> str:
        return "single" if self.is_single else f"grouped {self.tile_rows}"

    def tiles(self, world: CaseWorld, tables: BatchTables, ids: torch.Tensor) -> RoutedTiles:
        most = ids.numel() if self.is_single else 0
        with mock.patch.object(_MODULE, "MOST_SINGLE_ROUTES", most):
            return routed_tiles(tables, ids, list(world.modules.values()))


SINGLE, *GROUPED = WAYS = (Way(True, 16), Way(False, 16), Way(False, 64))


def ways(phase: str, num_routes: int) -> list[Way]:
    """The ways to time; the one that a server's CUDA graph has is the first."""
    grouped = GROUPED[:1] if phase == "decode" else GROUPED[::-1]
    if num_routes <= MOST_SINGLE_ROUTES:
        return [SINGLE, *grouped]
    return [*grouped, SINGLE] if num_routes <= MOST_TIMED_SINGLE else grouped


def add_routes(
    world: CaseWorld,
    layer: int,
    shape: ModuleShape,
    tiles: RoutedTiles,
    x: torch.Tensor,
    output: torch.Tensor,
    max_rank: int,
) -> torch.Tensor:
    """Add a module's products of all routes to ``output``, as the backend does.

    The backend also multiplies by the factors of the router, between the two kernels.

    Args:
        x: ``[T, in_features]``, or a row per route.
        output: ``[T * k, sum of out_features]``.
        max_rank: Largest rank of an adapter.
    """
    module, device = world.modules[shape.name], world.planes.device
    sizes = tiles.tile_rows, tiles.num_tiles
    inner = lora_shrink(
        x,
        world.planes.plane(0, layer),
        tiles,
        module,
        width=module.inner_width(max_rank),
        num_tiles=tiles.num_tiles,
        config=shrink_config(device, *sizes, shape.in_features),
        rows_per_input=len(output) // len(x),
    )
    return lora_expand(
        inner,
        world.planes.plane(-1, layer),
        tiles,
        module,
        output,
        num_tiles=tiles.num_tiles,
        config=expand_config(device, *sizes, sum(shape.out_features)),
    )


def works(
    experts: ExpertWorld,
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The work to time, and the error of each way's results.

    Returns:
        ``tiles/<way>`` and ``<module>/<way>``, the latter with the tiles: each is the work of all
        rounds. And per module and way the share of elements of the first round that differ from
        float32 by more than the tolerance.
    """
    world, todo, wrong = experts.world, {}, {}
    found = ways(world.case.phase, experts.num_routes)
    tables = {way: world.tables(world.scattered, way.tile_rows) for way in found}
    contiguous = world.tables(world.contiguous, found[0].tile_rows)
    todo = {f"tiles/{way.name}": _tiles(experts, way, tables[way]) for way in found}
    for shape in experts.shapes:
        x, base = experts.inputs(shape)
        in_torch = [
            InTorch(world, one.layer, shape, groups, experts.rows_per_input(shape))
            for one, groups in zip(experts.rounds, experts.groups, strict=True)
        ]
        truth, first = in_torch[0].add(x, base.float()), experts.rounds[0]
        for way in found:
            tiles = way.tiles(world, tables[way], first.topk_ids)
            sizes = x, base.clone(), max(world.case.ranks)
            result = add_routes(world, first.layer, shape, tiles, *sizes).float()
            name = f"{shape.name}/{way.name}"
            wrong[name] = float((~torch.isclose(result, truth, **TOLERANCE)).float().mean())
            todo[name] = _over(experts, shape, way, tables[way], x, base)
        todo[f"{shape.name}/contiguous"] = _over(experts, shape, found[0], contiguous, x, base)
        todo[f"{shape.name}/torch"] = _in_torch(in_torch, x, base)
    return todo, wrong


def _tiles(experts: ExpertWorld, way: Way, tables: BatchTables) -> Callable[[], object]:
    def work() -> RoutedTiles:
        for one in experts.rounds:
            tiles = way.tiles(experts.world, tables, one.topk_ids)
        return tiles

    return work


def _over(
    experts: ExpertWorld,
    shape: ModuleShape,
    way: Way,
    tables: BatchTables,
    x: torch.Tensor,
    base: torch.Tensor,
) -> Callable[[], object]:
    world, output = experts.world, base.clone()

    def work() -> torch.Tensor:
        for one in experts.rounds:
            tiles = way.tiles(world, tables, one.topk_ids)
            add_routes(world, one.layer, shape, tiles, x, output, max(world.case.ranks))
        return output

    return work


def _in_torch(in_torch: list[InTorch], x: torch.Tensor, base: torch.Tensor) -> Callable[[], object]:
    output = base.clone()

    def work() -> torch.Tensor:
        for one in in_torch:
            one.add(x, output)
        return output

    return work
