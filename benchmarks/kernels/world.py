"""Adapters in the slots of a pool, with enough layers that their weights miss the L2 cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.kernels.shapes import MODULES, NUM_LAYERS, SLOT_ELEMS, Case
from sglang_elora.kernels import (
    Batch,
    BatchTables,
    StackedModule,
    expand_config,
    lora_expand,
    lora_shrink,
    shrink_config,
)
from sglang_elora.pages import (
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    VocabularyModule,
    stacked_modules,
)

SEED = 0
ROTATE_BYTES = 256 * 2**20  # weights that a round reads; an H200's second-level cache holds 50 MB
MAX_LAYERS = 16
NUM_TOKENS = 128_256  # of Llama 3
WEIGHT_STD = 0.02
SCALING = 0.5


@dataclass
class CaseWorld:
    """One case on the device.

    Random weights everywhere in the pool, so that any page table names an adapter. ``scattered``
    adapters have random slots, ``contiguous`` ones adjacent slots.
    """

    case: Case
    num_layers: int
    planes: KVPlanes
    modules: dict[str, StackedModule]
    layouts: list[AdapterLayout]
    scattered: list[PagedAdapter]
    contiguous: list[PagedAdapter]

    @classmethod
    def build(
        cls,
        case: Case,
        device: torch.device,
        shapes: tuple[ModuleShape, ...] = MODULES,
        slot_elems: int = SLOT_ELEMS,
    ) -> CaseWorld:
        generator = torch.Generator(device).manual_seed(SEED)
        layouts = [AdapterLayout.build(rank, shapes) for rank in case.ranks]
        counts = [layout.num_slots(slot_elems, 1) for layout in layouts]
        layer_bytes = sum(sum(layout.plane_elems) * 2 for layout in layouts)
        num_layers = min(MAX_LAYERS, 1 + ROTATE_BYTES // layer_bytes)
        num_slots = sum(counts) + 1
        buffers = [
            [
                torch.empty(num_slots, slot_elems, dtype=torch.bfloat16, device=device).normal_(
                    0, WEIGHT_STD, generator=generator
                )
                for _ in range(num_layers)
            ]
            for _ in range(2)
        ]
        planes = KVPlanes(buffers, torch.bfloat16)
        mixed = torch.randperm(num_slots - 1, generator=generator, device=device) + 1
        straight = torch.arange(1, num_slots, device=device)
        world = cls(case, num_layers, planes, stacked_modules(shapes), layouts, [], [])
        begin = 0
        for layout, count in zip(layouts, counts, strict=True):
            for order, adapters in ((mixed, world.scattered), (straight, world.contiguous)):
                table = SlotTable(order[begin : begin + count])
                adapters.append(PagedAdapter(layout, table, planes, SCALING))
            begin += count
        return world

    def tables(self, adapters: list[PagedAdapter], tile_rows: int) -> BatchTables:
        names = tuple(self.modules)
        batch = Batch(np.stack([a.record(names) for a in adapters]), self.case.segments)
        tables = BatchTables(
            self.planes.device,
            num_modules=len(names),
            max_rows=self.case.num_rows,
            max_adapters=len(adapters),
            tile_rows=tile_rows,
            has_experts=any(module.num_experts > 1 for module in self.modules.values()),
        )
        tables.load(batch)
        return tables

    def inputs(self, shape: ModuleShape) -> tuple[torch.Tensor, torch.Tensor]:
        """x and base output, bfloat16, such that LoRA adds values of about the base's size."""
        generator = torch.Generator(self.planes.device).manual_seed(SEED)
        rows, device = self.case.num_rows, self.planes.device
        make = {"dtype": torch.bfloat16, "device": device, "generator": generator}
        x = torch.randn(rows, shape.in_features, **make) * input_std(shape, self.case)
        return x, torch.randn(rows, sum(shape.out_features), **make)


def input_std(shape: ModuleShape, case: Case) -> float:
    """Standard deviation of inputs for which that of the LoRA products is 1, or more where an
    adapter's rank is not the smallest. With smaller ones, a check's tolerance would hide errors."""
    return (shape.in_features * min(case.ranks)) ** -0.5 / (WEIGHT_STD**2 * SCALING)


def vocabulary_world(
    name: str, case: Case, device: torch.device, hidden_size: int, num_tokens: int
) -> tuple[CaseWorld, int]:
    """A world of adapters on the embedding or the output layer alone, and the tokens that its
    layers have parts for."""
    module = VocabularyModule(name, hidden_size, num_tokens, NUM_LAYERS)
    world = CaseWorld.build(case, device, (module.shape,))
    return world, world.num_layers * module.part_size


class Ours:
    """The two kernels of one module over every layer of a world.

    ``shrink_config`` and ``expand_config`` are how they are launched, as the backend chooses.
    """

    def __init__(self, world: CaseWorld, shape: ModuleShape, adapters: list[PagedAdapter]) -> None:
        tile_rows = 16 if world.case.phase == "decode" else 64
        self.world, self.module = world, world.modules[shape.name]
        self.tables = world.tables(adapters, tile_rows)
        device, tiles = world.planes.device, self.tables.num_tiles
        self.width = self.module.inner_width(max(world.case.ranks))
        self.shrink_config = shrink_config(device, tile_rows, tiles, shape.in_features)
        self.expand_config = expand_config(device, tile_rows, tiles, sum(shape.out_features))
        self.inner: torch.Tensor | None = None

    def shrink(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        self.inner = lora_shrink(
            x,
            self.world.planes.plane(0, layer),
            self.tables,
            self.module,
            width=self.width,
            num_tiles=self.tables.num_tiles,
            config=self.shrink_config,
        )
        return self.inner

    def expand(self, layer: int, inner: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return lora_expand(
            inner,
            self.world.planes.plane(-1, layer),
            self.tables,
            self.module,
            output,
            num_tiles=self.tables.num_tiles,
            config=self.expand_config,
        )

    def both(self, layer: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.expand(layer, self.shrink(layer, x), output)


def expected(
    world: CaseWorld, shape: ModuleShape, layer: int, x: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Reference result of both kernels added to a base output, in float32, per adapter."""
    output = base.to(torch.float32, copy=True)
    owners = torch.tensor(
        [adapter for adapter, rows in world.case.segments for _ in range(rows)], device=x.device
    )
    for i, (adapter, layout) in enumerate(zip(world.scattered, world.layouts, strict=True)):
        rows = (owners == i).nonzero().flatten()
        inner = x[rows].float() @ adapter.a(layer, shape.name).float().T * adapter.scaling
        inner = inner.bfloat16().float()  # as it is rounded between the halves
        column = 0
        for part, out in enumerate(shape.out_features):
            own = inner[:, part * layout.rank : (part + 1) * layout.rank]
            output[rows, column : column + out] += own @ adapter.b(layer, shape.name, part).float()
            column += out
    return output
