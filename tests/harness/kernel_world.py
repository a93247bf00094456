"""Adapters in slots of a poisoned pool, and batches over them, for kernels and references alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from sglang_elora.kernels import Batch, BatchTables, StackedModule
from sglang_elora.kernels.addressing import INTERPRETED
from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    stacked_modules,
)

POISON = float("nan")
DEVICE = "cpu" if INTERPRETED else "cuda"
Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B."""
Order = Callable[[int, int], list[int]]
"""(number of slots, first free one) -> their numbers in the order of the adapter's addresses."""


def contiguous(count: int, first: int) -> list[int]:
    return list(range(first, first + count))


def reverse(count: int, first: int) -> list[int]:
    return contiguous(count, first)[::-1]


def scattered(count: int, first: int) -> list[int]:
    return random.Random(count).sample(contiguous(count, first), count)


ORDERS: dict[str, Order] = {
    "contiguous": contiguous,
    "reverse": reverse,
    "scattered": scattered,
}


@dataclass
class KernelWorld:
    """One layer's planes with adapters in them; all other slots hold poison."""

    planes: KVPlanes
    modules: dict[str, StackedModule]
    layouts: list[AdapterLayout]
    tables: list[SlotTable]
    adapters: list[PagedAdapter]
    matrices: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]
    ranks: list[int]
    scalings: list[float]

    def batch(self, segments: Sequence[tuple[int, int]]) -> Batch:
        """Of ``(adapter, rows)``, -1 for the base model."""
        import numpy as np

        records = np.stack([adapter.record(tuple(self.modules)) for adapter in self.adapters])
        return Batch(records, segments)

    def batch_tables(
        self,
        segments: Sequence[tuple[int, int]],
        tile_rows: int,
        spare: int = 0,
        has_experts: bool = False,
    ) -> BatchTables:
        """On the device; with room for ``spare`` more rows and adapters."""
        batch = self.batch(segments)
        tables = BatchTables(
            self.planes.device,
            num_modules=len(self.modules),
            max_rows=batch.num_rows + spare,
            max_adapters=len(self.adapters) + spare,
            tile_rows=tile_rows,
            has_experts=has_experts,
        )
        tables.load(batch)
        return tables

    def a_offsets(self, name: str) -> list[int]:
        return [x.places[name].a_offset if name in x.places else -1 for x in self.layouts]

    def b_offsets(self, name: str) -> list[int]:
        return [x.places[name].b_offsets[0] if name in x.places else -1 for x in self.layouts]


def make_world(
    shapes: Sequence[ModuleShape],
    ranks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    kv_dim: int = 64,
    page_size: int = 1,
    order: str = "scattered",
    num_planes: int = 2,
    num_layers: int = 1,
    lacks: Callable[[int, str], bool] = lambda adapter, name: False,
    device: str = DEVICE,
) -> KernelWorld:
    """Adapters of given ranks, one after the other in whole pages of one pool.

    The matrices of a layer are those of the layer before, rotated by a row.

    Args:
        lacks: Whether an adapter lacks a module.
    """
    generator = torch.Generator().manual_seed(len(ranks))
    kv_dtype = kv_dtype or dtype
    slot_elems = kv_dim * kv_dtype.itemsize // dtype.itemsize
    layouts = [
        AdapterLayout.build(rank, [s for s in shapes if not lacks(i, s.name)], num_planes)
        for i, rank in enumerate(ranks)
    ]
    counts = [layout.num_slots(slot_elems, page_size) for layout in layouts]
    num_slots = sum(counts) + 2 * page_size
    pool = [
        [
            torch.empty(num_slots, 1, kv_dim, dtype=kv_dtype, device=device)
            for _ in range(num_layers)
        ]
        for _ in range(num_planes)
    ]
    planes = KVPlanes(pool, dtype)
    for plane, layer in product(range(num_planes), range(num_layers)):
        planes.plane(plane, layer).fill_(POISON)
    world = KernelWorld(planes, stacked_modules(shapes), layouts, [], [], [], list(ranks), [])
    first = page_size
    for i, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
        matrices = {
            name: (
                torch.randn(place.a_rows, place.shape.in_features, generator=generator)
                / place.shape.in_features**0.5,
                torch.randn(
                    place.shape.num_experts * sum(place.shape.out_features),
                    layout.rank,
                    generator=generator,
                )
                / layout.rank**0.5,
            )
            for name, place in layout.places.items()
        }
        matrices = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in matrices.items()}
        scaling = (0.5, 1.0, 2.0)[i % 3]

        def of_layer(layer: int, name: str, matrices: Mapping[str, Pair] = matrices) -> Pair:
            a, b = matrices[name]
            return a.roll(layer, 0), b.roll(layer, 0)

        image = AdapterImage.build(layout, num_layers, of_layer, dtype, scaling)
        pages = ORDERS[order](count // page_size, first // page_size)
        numbers = [page * page_size + i for page in pages for i in range(page_size)]
        table = SlotTable(torch.tensor(numbers, device=device))
        planes.write(table, image)
        world.tables.append(table)
        world.adapters.append(PagedAdapter(layout, table, planes, scaling))
        world.matrices.append(matrices)
        world.scalings.append(scaling)
        first += count
    return world


def rows_of(segments: Sequence[tuple[int, int]], num_adapters: int) -> list[torch.Tensor]:
    """Per adapter, its rows."""
    numbers = [adapter for adapter, n in segments for _ in range(n)]
    owners = torch.tensor(numbers, dtype=torch.long, device=DEVICE)
    return [(owners == adapter).nonzero().flatten() for adapter in range(num_adapters)]
