"""The LoRA kernels against their references in float32, every element written in its place only."""

from __future__ import annotations

import torch

from sglang_elora.kernels import (
    ExpandConfig,
    ShrinkConfig,
    lora_expand,
    lora_logits,
    lora_lookup,
    lora_shrink,
    reference,
)
from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import Segments
from tests.harness.kernel_world import DEVICE, KernelWorld, rows_of
from tests.harness.tolerances import TOLERANCES

EXPAND = ExpandConfig(block_n=64, block_r=16, max_tile_programs=256, num_warps=4, num_stages=2)
SHRINK = ShrinkConfig(
    block_n=32,
    block_k=64,
    lanes=1,
    num_splits=1,
    max_tile_programs=256,
    num_warps=4,
    num_stages=2,
)


def random_inner(
    world: KernelWorld, name: str, parts: int, segments: Segments, num_splits: int, spare_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A result of the first kernel, NaN where it is undefined, and which rows have an adapter with
    the module."""
    num_rows = sum(length for _, length in segments) + spare_rows
    rows = rows_of(segments, len(world.ranks))
    width = parts * max(world.ranks) + 5
    generator = torch.Generator().manual_seed(num_rows)
    inner = torch.full((num_splits, num_rows, width), torch.nan, device=DEVICE)
    owned = torch.zeros(num_rows, dtype=torch.bool, device=DEVICE)
    for own, rank, offset in zip(rows, world.ranks, world.b_offsets(name), strict=True):
        if offset >= 0:
            values = torch.randn(num_splits, len(own), parts * rank, generator=generator)
            inner[:, own, : parts * rank] = (values / num_splits).to(DEVICE)
            owned[own] = True
    return inner, owned


def check_expand(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    config: ExpandConfig = EXPAND,
    tile_rows: int = 16,
    num_splits: int = 1,
    spare_columns: int = 3,
    spare_rows: int = 2,
) -> None:
    """``lora_expand`` and its reference agree on adapter rows; all other rows keep every bit."""
    dtype, module = world.planes.weight_dtype, world.modules[shape.name]
    parts, out = len(shape.out_features), sum(shape.out_features)
    rows = rows_of(segments, len(world.ranks))
    inner, owned = random_inner(world, shape.name, parts, segments, num_splits, spare_rows)
    generator = torch.Generator().manual_seed(len(owned))
    base = torch.randn(len(owned), out + spare_columns, generator=generator).to(DEVICE, dtype)
    tables = world.batch_tables(segments, tile_rows)
    plane = world.planes.plane(-1, 0)
    output = base.clone()
    returned = lora_expand(
        inner, plane, tables, module, output, num_tiles=tables.num_tiles, config=config
    )
    assert returned is output
    expected = reference.lora_expand(
        inner.sum(dim=0).to(dtype).float(),  # as it is rounded between the two halves
        plane,
        rows,
        [table.slots for table in world.tables],
        world.ranks,
        world.b_offsets(shape.name),
        module,
        base[:, :out].float(),
    )
    torch.testing.assert_close(output[owned, :out].float(), expected[owned], **TOLERANCES[dtype])
    assert torch.equal(output[~owned], base[~owned]), "rows of nobody changed"
    assert torch.equal(output[:, out:], base[:, out:]), "columns behind the output changed"


def check_shrink(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    config: ShrinkConfig = SHRINK,
    tile_rows: int = 16,
    spare_width: int = 5,
    spare_rows: int = 2,
) -> torch.Tensor:
    """``lora_shrink`` and its reference agree, on every element that is defined."""
    module = world.modules[shape.name]
    num_rows = sum(length for _, length in segments) + spare_rows
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, shape.in_features, generator=generator)
    x = x.to(DEVICE, world.planes.weight_dtype)
    tables = world.batch_tables(segments, tile_rows)
    width = len(shape.out_features) * max(world.ranks) + spare_width
    empty = torch.full((config.num_splits, num_rows, width), torch.nan, device=DEVICE)
    inner = lora_shrink(
        x,
        world.planes.plane(0, 0),
        tables,
        module,
        width=width,
        num_tiles=tables.num_tiles,
        config=config,
        out=empty.clone(),
    )
    expected = reference.lora_shrink(
        x,
        world.planes.plane(0, 0),
        rows_of(segments, len(world.ranks)),
        [table.slots for table in world.tables],
        world.ranks,
        world.scalings,
        world.a_offsets(shape.name),
        module,
        empty[0].clone(),
    )
    defined = ~expected.isnan()
    assert torch.equal(~inner.isnan(), defined.expand_as(inner)), "written elsewhere, or not at all"
    torch.testing.assert_close(
        inner.sum(dim=0)[defined], expected[defined], **TOLERANCES[world.planes.weight_dtype]
    )
    return inner


def check_lookup(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    tile_rows: int = 16,
    spare_width: int = 5,
    spare_rows: int = 2,
) -> torch.Tensor:
    """``lora_lookup`` and its reference agree, on every element that is defined.

    The last part of the vocabulary is half as long. Some tokens are outside the vocabulary.
    """
    module, num_layers = world.modules[shape.name], world.planes.num_layers
    vocab_size = (num_layers - 1) * shape.in_features + -(-shape.in_features // 2)
    num_rows = sum(length for _, length in segments) + spare_rows
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(-1, vocab_size + 9, (num_rows,), generator=generator).to(DEVICE)
    known = torch.tensor([0, shape.in_features - 1, vocab_size - 1, vocab_size], device=DEVICE)
    tokens[: len(known)] = known[:num_rows]
    tables = world.batch_tables(segments, tile_rows)
    inner = lora_lookup(
        tokens,
        world.planes.pool_planes,
        tables,
        module,
        vocab_size=vocab_size,
        dtype=world.planes.weight_dtype,
        width=max(world.ranks) + spare_width,
        num_tiles=tables.num_tiles,
    )
    expected = reference.lora_lookup(
        tokens,
        [world.planes.plane(0, layer) for layer in range(num_layers)],
        rows_of(segments, len(world.ranks)),
        [table.slots for table in world.tables],
        world.ranks,
        world.scalings,
        world.a_offsets(shape.name),
        module,
        vocab_size,
        torch.full_like(inner[0], torch.nan),
    )
    defined = ~expected.isnan()
    torch.testing.assert_close(inner[0][defined], expected[defined], rtol=1e-6, atol=0)
    return inner


def check_logits(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    vocab_size: int,
    config: ExpandConfig = EXPAND,
    tile_rows: int = 16,
    num_splits: int = 1,
    spare_columns: int = 3,
    spare_rows: int = 2,
) -> None:
    """``lora_logits`` and its reference agree on adapter rows; all other rows keep every bit."""
    dtype, layers = world.planes.weight_dtype, range(world.planes.num_layers)
    inner, owned = random_inner(world, shape.name, 1, segments, num_splits, spare_rows)
    generator = torch.Generator().manual_seed(len(owned))
    base = torch.randn(len(owned), vocab_size + spare_columns, generator=generator)
    base = base.to(DEVICE, dtype)
    tables = world.batch_tables(segments, tile_rows)
    output = base.clone()
    returned = lora_logits(
        inner,
        world.planes.pool_planes,
        tables,
        world.modules[shape.name],
        output,
        vocab_size=vocab_size,
        num_tiles=tables.num_tiles,
        config=config,
    )
    assert returned is output
    expected = reference.lora_logits(
        inner.sum(dim=0).to(dtype).float(),  # as it is rounded between the two halves
        [world.planes.plane(-1, layer) for layer in layers],
        rows_of(segments, len(world.ranks)),
        [table.slots for table in world.tables],
        world.ranks,
        world.b_offsets(shape.name),
        world.modules[shape.name],
        vocab_size,
        base[:, :vocab_size].float(),
    )
    found = output[owned, :vocab_size].float()
    torch.testing.assert_close(found, expected[owned], **TOLERANCES[dtype])
    assert torch.equal(output[~owned], base[~owned]), "rows without an adapter changed"
    assert torch.equal(output[:, vocab_size:], base[:, vocab_size:]), "further columns changed"
