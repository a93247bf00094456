"""Offsets of an adapter's matrices, against ones computed by hand."""

from __future__ import annotations

import pytest

from sglang_elora.pages import TILE, AdapterLayout, ModuleShape
from sglang_elora.pages.layout import padded

QKV = ModuleShape("qkv_proj", 256, (256, 64, 64))
DOWN = ModuleShape("down_proj", 100, (70,))
EXPERTS = ModuleShape("gate_up_proj_moe", 100, (70, 70), num_experts=5)


def test_adapter_layout_offsets_equal_hand_computed_ones() -> None:
    layout = AdapterLayout.build(8, [QKV, DOWN])
    qkv, down = layout.places["qkv_proj"], layout.places["down_proj"]
    assert (qkv.a_rows, qkv.a_stride, qkv.a_offset) == (24, 256, 0)
    assert (down.a_rows, down.a_stride, down.a_offset) == (8, 128, 24 * 256)
    assert qkv.b_offsets == (0, 8 * 256, 8 * 320)
    assert [qkv.b_stride(part) for part in range(3)] == [256, 64, 64]
    assert (down.b_offsets, down.b_stride(0)) == ((8 * 384,), 128)
    assert layout.plane_elems == (24 * 256 + 8 * 128, 8 * 384 + 8 * 128)


def test_experts_have_blocks_one_after_the_other() -> None:
    layout = AdapterLayout.build(8, [DOWN, EXPERTS, QKV])
    experts, qkv = layout.places["gate_up_proj_moe"], layout.places["qkv_proj"]
    assert (experts.a_offset, experts.a_rows, experts.a_stride) == (8 * 128, 5 * 16, 128)
    assert experts.b_offsets == (8 * 128, 8 * 128 + 8 * 128)  # of the first expert
    assert qkv.a_offset == 8 * 128 + 5 * 16 * 128
    assert qkv.b_offsets[0] == 8 * 128 + 5 * 2 * 8 * 128


@pytest.mark.parametrize("num_planes", [1, 2])
def test_modules_that_share_no_layer_lie_at_the_same_addresses(num_planes: int) -> None:
    dense = ModuleShape("gate_up_proj@0", 64, (64, 64), layers=frozenset({0}))
    shared = ModuleShape("gate_up_proj@1", 64, (32, 32), layers=frozenset({1, 2}))
    experts = ModuleShape("down_proj_moe", 64, (64,), 4, layers=frozenset({1, 2}))
    layout = AdapterLayout.build(8, [QKV, dense, shared, experts], num_planes)
    qkv, *others = (layout.places[s.name] for s in (QKV, dense, shared, experts))
    begin = qkv.a_rows * qkv.a_stride
    assert [place.a_offset for place in others] == [begin, begin, begin + 2 * 8 * 64]
    a_end = begin + max(2 * 8 * 64, 2 * 8 * 64 + 4 * 8 * 64)
    b_begin = 8 * 384 + (a_end if num_planes == 1 else 0)
    assert [place.b_offsets[0] for place in others] == [b_begin, b_begin, b_begin + 2 * 8 * 64]
    b_end = 8 * 384 + 2 * 8 * 64 + 4 * 8 * 64
    assert layout.plane_elems == ((a_end, b_end) if num_planes == 2 else (a_end + b_end,))
    assert dense.module == shared.module == "gate_up_proj"
    assert [shared.is_in(layer) for layer in range(3)] == [False, True, True]


def test_adapter_layout_in_one_plane_places_b_after_a() -> None:
    two = AdapterLayout.build(8, [QKV, DOWN])
    one = AdapterLayout.build(8, [QKV, DOWN], num_planes=1)
    a_elems = two.plane_elems[0]
    assert one.plane_elems == (sum(two.plane_elems),)
    for name, place in one.places.items():
        assert place.a_offset == two.places[name].a_offset
        assert place.b_offsets == tuple(a_elems + b for b in two.places[name].b_offsets)


@pytest.mark.parametrize("rank", [1, 3, 8, 24, 64])
def test_adapter_layout_matrices_are_tile_aligned_and_disjoint(rank: int) -> None:
    layout = AdapterLayout.build(rank, [QKV, EXPERTS, DOWN], num_planes=1)
    taken: set[int] = set()
    for place in layout.places.values():
        pieces = [(place.a_offset, place.a_rows * place.a_stride)]
        for part, offset in enumerate(place.b_offsets):
            for expert in range(place.shape.num_experts):
                begin = offset + expert * rank * sum(map(padded, place.shape.out_features))
                pieces.append((begin, rank * place.b_stride(part)))
        for offset, size in pieces:
            assert offset % TILE == 0
            elems = set(range(offset, offset + size))
            assert not elems & taken
            taken |= elems
    assert taken == set(range(layout.plane_elems[0]))


def test_num_slots_is_whole_pages_of_the_longer_plane() -> None:
    layout = AdapterLayout.build(8, [QKV])  # A 6144 elements, B 3072
    assert layout.num_slots(slot_elems=64, page_size=1) == 96
    assert layout.num_slots(slot_elems=100, page_size=1) == 62
    assert layout.num_slots(slot_elems=100, page_size=16) == 64


def test_num_slots_of_a_llama_8b_adapter_of_rank_16() -> None:
    """The figure of the design: about 670 slots of 1,024 elements."""
    shapes = [
        ModuleShape("qkv_proj", 4096, (4096, 1024, 1024)),
        ModuleShape("o_proj", 4096, (4096,)),
        ModuleShape("gate_up_proj", 4096, (14336, 14336)),
        ModuleShape("down_proj", 14336, (4096,)),
    ]
    layout = AdapterLayout.build(16, shapes)
    assert layout.num_slots(slot_elems=1024, page_size=1) == 672


def test_num_slots_of_an_adapter_without_modules_is_zero() -> None:
    assert AdapterLayout.build(8, []).num_slots(64, 16) == 0


@pytest.mark.parametrize(("rank", "num_planes"), [(0, 2), (8, 0), (8, 3)])
def test_adapter_layout_refuses_invalid_rank_or_planes(rank: int, num_planes: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}.*planes {num_planes}"):
        AdapterLayout.build(rank, [QKV], num_planes)


@pytest.mark.parametrize("sizes", [(0, (1,)), (1, (1, 0)), (1, ())])
def test_module_shape_refuses_non_positive_sizes(sizes: tuple[int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="positive"):
        ModuleShape("x", *sizes)


def test_module_shape_refuses_experts_with_parts_of_unequal_size() -> None:
    with pytest.raises(ValueError, match="parts of experts"):
        ModuleShape("x", 8, (8, 16), num_experts=2)
    with pytest.raises(ValueError, match="positive"):
        ModuleShape("x", 8, (8,), num_experts=0)
