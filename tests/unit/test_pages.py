"""Adapters written into slots and read back: every element in its place, no other slot changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    StridedRows,
)

LAYERS, SLOTS, POISON = 3, 700, 0xA5
SHAPES = (
    ModuleShape("qkv_proj", 256, (256, 64, 64)),
    ModuleShape("o_proj", 256, (256,)),
    ModuleShape("odd", 100, (70, 33)),
)
Order = Callable[[int], list[int]]


def contiguous(count: int) -> list[int]:
    return list(range(5, 5 + count))


def reverse(count: int) -> list[int]:
    return list(range(5 + count, 5, -1))


def scattered(count: int) -> list[int]:
    return random.Random(count).sample(range(1, SLOTS), count)


def in_pages(count: int) -> list[int]:
    pages = random.Random(count).sample(range(1, SLOTS // 16), -(-count // 16))
    return [16 * page + i for page in pages for i in range(16)][:count]


def make_pool(dtype: torch.dtype, heads: int = 2, num_planes: int = 2) -> list[list[torch.Tensor]]:
    planes = []
    for _ in range(num_planes):
        tensors = [torch.empty(SLOTS, heads, 32, dtype=dtype) for _ in range(LAYERS)]
        for tensor in tensors:
            tensor.view(torch.uint8).fill_(POISON)
        planes.append(tensors)
    return planes


def make_image(
    rank: int,
    dtype: torch.dtype,
    shapes: Sequence[ModuleShape] = SHAPES,
    num_planes: int = 2,
    scaling: float = 0.5,
) -> tuple[AdapterImage, dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(rank)
    truth = {
        (layer, shape.name): (
            torch.randn(len(shape.out_features) * rank, shape.in_features, generator=generator).to(
                dtype
            ),
            torch.randn(sum(shape.out_features), rank, generator=generator).to(dtype),
        )
        for layer in range(LAYERS)
        for shape in shapes
    }
    layout = AdapterLayout.build(rank, shapes, num_planes)
    image = AdapterImage.build(
        layout, LAYERS, lambda layer, name: truth[layer, name], dtype, scaling=scaling
    )
    return image, truth


def check_equal(
    adapter: PagedAdapter, truth: dict[tuple[int, str], tuple[torch.Tensor, ...]]
) -> None:
    shapes = {shape.name: shape for shape in SHAPES}
    for (layer, name), (a, b) in truth.items():
        assert torch.equal(adapter.a(layer, name), a)
        parts = [adapter.b(layer, name, i) for i in range(len(shapes[name].out_features))]
        assert torch.equal(torch.cat(parts, dim=1).T, b)


@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize("order", [contiguous, reverse, scattered, in_pages])
@pytest.mark.parametrize(
    ("weights", "kv"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.uint8),  # how fp8 KV is stored
        (torch.float16, torch.float32),
    ],
)
def test_adapter_written_to_slots_is_read_back_exactly(
    rank: int, order: Order, weights: torch.dtype, kv: torch.dtype
) -> None:
    pool = make_pool(kv, heads=4)
    planes = KVPlanes(pool, weights)
    image, truth = make_image(rank, weights)
    count = image.layout.num_slots(planes.slot_elems, 1)
    slots = torch.tensor(order(count))
    planes.write(SlotTable(slots), image)
    check_equal(PagedAdapter(image.layout, SlotTable(slots), planes, image.scaling), truth)

    mine = torch.zeros(SLOTS, dtype=torch.bool)
    mine[slots] = True
    for plane in pool:
        for tensor in plane:
            rest = tensor.view(torch.uint8).reshape(SLOTS, -1)[~mine]
            assert (rest == POISON).all()


def test_two_adapters_in_interleaved_slots_are_read_back_exactly() -> None:
    planes = KVPlanes(make_pool(torch.float32), torch.float32)
    numbers = random.Random(0).sample(range(1, SLOTS), SLOTS - 1)
    adapters = []
    for rank in (3, 5):
        image, truth = make_image(rank, torch.float32)
        slots = torch.tensor([numbers.pop() for _ in range(image.layout.num_slots(64, 1))])
        planes.write(SlotTable(slots), image)
        adapters.append((PagedAdapter(image.layout, SlotTable(slots), planes, 1.0), truth))
    for adapter, truth in adapters:
        check_equal(adapter, truth)


def test_adapter_in_one_plane_is_read_back_exactly() -> None:
    planes = KVPlanes(make_pool(torch.float32, num_planes=1), torch.float32)
    image, truth = make_image(8, torch.float32, num_planes=1)
    slots = torch.tensor(scattered(image.layout.num_slots(64, 1)))
    planes.write(SlotTable(slots), image)
    check_equal(PagedAdapter(image.layout, SlotTable(slots), planes, 1.0), truth)


@pytest.mark.parametrize("order", [contiguous, scattered])
@pytest.mark.parametrize("num_planes", [1, 2])
def test_matrices_of_experts_are_read_back_exactly(order: Order, num_planes: int) -> None:
    experts, parts, rank = 3, 2, 4
    shapes = [SHAPES[1], ModuleShape("gate_up_proj_moe", 100, (40, 40), experts)]
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(LAYERS, experts, parts, *size, generator=generator)
        for size in ((rank, 100), (40, rank))
    )
    ordinary = torch.randn(rank, 256, generator=generator)
    layout = AdapterLayout.build(rank, shapes, num_planes)
    image = AdapterImage.build(
        layout,
        LAYERS,
        lambda layer, name: (
            (ordinary, ordinary.T)
            if name == "o_proj"
            else (a[layer].view(-1, 100), b[layer].view(-1, rank))
        ),
        torch.float32,
        1.0,
    )
    planes = KVPlanes(make_pool(torch.float32, num_planes=num_planes), torch.float32)
    table = SlotTable(torch.tensor(order(layout.num_slots(planes.slot_elems, 1))))
    planes.write(table, image)
    adapter = PagedAdapter(layout, table, planes, 1.0)
    for layer in range(LAYERS):
        for e in range(experts):
            found = adapter.a(layer, "gate_up_proj_moe", e)
            assert torch.equal(found, a[layer, e].flatten(0, 1))
            for part in range(parts):
                found = adapter.b(layer, "gate_up_proj_moe", part, e)
                assert torch.equal(found, b[layer, e, part].T)
        assert torch.equal(adapter.a(layer, "o_proj"), ordinary)
        assert torch.equal(adapter.b(layer, "o_proj", 0), ordinary)


def test_layers_of_several_shapes_are_read_back_exactly() -> None:
    """Two modules of different layers lie at the same addresses; the last layer has neither."""
    narrow = ModuleShape("down_proj@0", 100, (40,), layers=frozenset({0}))
    wide = ModuleShape("down_proj@1", 256, (70,), layers=frozenset({1}))
    shapes, rank = [SHAPES[1], narrow, wide], 4
    generator = torch.Generator().manual_seed(0)
    truth = {
        (layer, shape.name): (
            torch.randn(rank, shape.in_features, generator=generator),
            torch.randn(shape.out_features[0], rank, generator=generator),
        )
        for layer in range(LAYERS)
        for shape in shapes
        if shape.is_in(layer)
    }
    layout = AdapterLayout.build(rank, shapes)
    image = AdapterImage.build(layout, LAYERS, lambda *key: truth[key], torch.float32, 1.0)
    assert layout.places[narrow.name].a_offset == layout.places[wide.name].a_offset
    ordinary = layout.places["o_proj"]
    assert not image.layer(LAYERS - 1)[rank * ordinary.a_stride : layout.plane_elems[0]].any()
    planes = KVPlanes(make_pool(torch.float32), torch.float32)
    table = SlotTable(torch.tensor(scattered(layout.num_slots(planes.slot_elems, 1))))
    planes.write(table, image)
    adapter = PagedAdapter(layout, table, planes, 1.0)
    for (layer, name), (a, b) in truth.items():
        assert torch.equal(adapter.a(layer, name), a)
        assert torch.equal(adapter.b(layer, name, 0), b.T)


def placed(order: Order) -> tuple[list[list[torch.Tensor]], PagedAdapter]:
    """A pool, and an adapter in slots of that order."""
    pool = make_pool(torch.float32)
    planes = KVPlanes(pool, torch.float32)
    image, _ = make_image(8, torch.float32)
    slots = torch.tensor(order(image.layout.num_slots(64, 1)))
    planes.write(SlotTable(slots), image)
    return pool, PagedAdapter(image.layout, SlotTable(slots), planes, 1.0)


@pytest.mark.parametrize(("order", "is_view"), [(contiguous, True), (scattered, False)])
def test_adapter_matrices_are_views_if_slots_are_adjacent(order: Order, is_view: bool) -> None:
    pool, adapter = placed(order)
    a = adapter.a(0, "qkv_proj")
    assert (a.untyped_storage().data_ptr() == pool[0][0].untyped_storage().data_ptr()) == is_view
    assert adapter.a(0, "qkv_proj").data_ptr() == a.data_ptr()


def test_copy_of_scattered_slots_is_made_once_per_layer_and_pass() -> None:
    pool, adapter = placed(scattered)

    def storage(layer: int, module: str) -> int:
        return adapter.a(layer, module).untyped_storage().data_ptr()

    first = adapter.a(0, "qkv_proj")
    assert storage(0, "o_proj") == first.untyped_storage().data_ptr(), "one copy of a layer"
    assert adapter.b(0, "qkv_proj", 0).untyped_storage().data_ptr() != storage(0, "o_proj")
    assert adapter.a(0, "qkv_proj") is first
    before = adapter.a(1, "qkv_proj").clone()
    for plane in pool:
        for layer in plane:
            layer.mul_(2)
    assert torch.equal(adapter.a(1, "qkv_proj"), before)
    for free in (False, True):
        adapter.forget_copies(free=free)
        assert torch.equal(adapter.a(1, "qkv_proj"), 2 * before), "the pool is read again"


def test_matrix_read_copies_only_if_its_slots_are_scattered() -> None:
    """Two runs of slots: a matrix inside one of them needs no copy."""
    pool = make_pool(torch.float32)
    planes = KVPlanes(pool, torch.float32)
    image, truth = make_image(8, torch.float32)
    count = image.layout.num_slots(64, 1)
    slots = torch.tensor([*range(300, 300 + 96), *range(10, 10 + count - 96)])
    planes.write(SlotTable(slots), image)
    adapter = PagedAdapter(image.layout, SlotTable(slots), planes, 1.0)
    check_equal(adapter, truth)
    for name in ("qkv_proj", "o_proj"):  # A of qkv_proj fills the first 96 slots
        storage = adapter.a(1, name).untyped_storage().data_ptr()
        assert storage == pool[0][1].untyped_storage().data_ptr()


def test_copy_holds_only_the_slots_of_scattered_matrices() -> None:
    pool = make_pool(torch.float32)
    planes = KVPlanes(pool, torch.float32)
    image, truth = make_image(8, torch.float32)
    places, count = image.layout.places, image.layout.num_slots(64, 1)
    slots = list(range(10, 10 + count))
    first, end, _ = planes.slots_of(
        StridedRows(places["o_proj"].a_offset, places["o_proj"].a_rows, places["o_proj"].a_stride)
    )
    slots[first] = 500  # no longer next to the slot after it
    planes.write(SlotTable(torch.tensor(slots)), image)
    adapter = PagedAdapter(image.layout, SlotTable(torch.tensor(slots)), planes, 1.0)
    check_equal(adapter, truth)
    copied = adapter.a(1, "o_proj").untyped_storage()
    assert copied.nbytes() == (end - first) * planes.slot_bytes
    own = adapter.a(1, "qkv_proj").untyped_storage()
    assert own.data_ptr() == pool[0][1].untyped_storage().data_ptr()


@pytest.mark.parametrize("seed", range(20))
def test_slot_table_runs_cover_all_slots_in_order(seed: int) -> None:
    rng = random.Random(seed)
    numbers: list[int] = []
    while len(numbers) < 40:
        start = rng.randrange(0, 10_000, 100)
        numbers += range(start, start + rng.randint(1, 9))
    table = SlotTable(torch.tensor(numbers))
    assert len(table) == len(numbers)
    for start in range(len(numbers)):
        for end in range(start + 1, len(numbers) + 1):
            piece = numbers[start:end]
            adjacent = piece == list(range(piece[0], piece[0] + len(piece)))
            assert table.run(start, end) == (piece[0] if adjacent else None)
        assert table.run(start, len(numbers) + 1) is None, "behind the table"


def test_paged_adapter_lacks_modules_it_does_not_adapt() -> None:
    image, _ = make_image(8, torch.float32, SHAPES[:1])
    planes = KVPlanes(make_pool(torch.float32), torch.float32)
    slots = torch.tensor(contiguous(image.layout.num_slots(64, 1)))
    adapter = PagedAdapter(image.layout, SlotTable(slots), planes, 1.0)
    assert adapter.has("qkv_proj") and not adapter.has("o_proj")


def test_image_version_depends_on_the_content() -> None:
    image, truth = make_image(8, torch.bfloat16)
    again, _ = make_image(8, torch.bfloat16)
    assert image.version == again.version
    truth[1, "o_proj"][0][3, 5] += 1
    other = AdapterImage.build(
        image.layout, LAYERS, lambda layer, name: truth[layer, name], torch.bfloat16, scaling=0.5
    )
    rescaled, _ = make_image(8, torch.bfloat16, scaling=0.25)
    assert len({image.version, other.version, rescaled.version}) == 3
    assert image.nbytes == LAYERS * sum(image.plane_bytes) > 0


def chunks_of(num_bytes: int, seed: int) -> list[torch.Tensor]:
    """Memory for an image in stretches of any lengths, with gaps between them."""
    rng, chunks = random.Random(seed), []
    memory = torch.full((3 * num_bytes,), POISON, dtype=torch.uint8)
    start = 0
    while num_bytes:
        chunks.append(memory[start : start + min(num_bytes, rng.randint(1, 70_000))])
        start += len(chunks[-1]) + rng.randint(0, 5)
        num_bytes -= len(chunks[-1])
    return chunks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_in_scattered_memory_is_written_to_its_slots(seed: int, dtype: torch.dtype) -> None:
    """Borders of its memory lie within layers, rows and elements."""
    plain, truth = make_image(24, dtype)
    chunks = chunks_of(plain.nbytes, seed)
    assert len(chunks) > LAYERS
    image = AdapterImage.build(
        plain.layout, LAYERS, lambda layer, name: truth[layer, name], dtype, 0.5, chunks
    )
    assert image.version == plain.version and image.nbytes == plain.nbytes
    planes = KVPlanes(make_pool(dtype, heads=4), dtype)
    table = SlotTable(torch.tensor(scattered(image.layout.num_slots(planes.slot_elems, 1))))
    planes.write(table, image)
    check_equal(PagedAdapter(image.layout, table, planes, image.scaling), truth)


def test_image_copied_to_other_memory_is_equal() -> None:
    plain, _ = make_image(8, torch.float32)
    there = plain.copied_to(chunks_of(plain.nbytes, 1))
    back = there.copied_to([torch.zeros(plain.nbytes, dtype=torch.uint8)])
    assert len(there.chunks) > 1 and there.version == back.version == plain.version
    for layer in range(LAYERS):
        assert torch.equal(there.layer(layer), plain.layer(layer))
        assert torch.equal(back.layer(layer), plain.layer(layer))


def test_image_pieces_are_whole_layers_in_order() -> None:
    layout = AdapterLayout.build(8, SHAPES[1:2])
    matrices = torch.ones(8, 256), torch.ones(256, 8)
    plain = AdapterImage.build(layout, 20, lambda *_: matrices, torch.float32, 1.0)
    image = plain.copied_to(chunks_of(plain.nbytes, 2))
    assert [piece.num_layers for piece in image.pieces] == [2] * 10  # an eighth, rounded down
    assert sum(piece.nbytes for piece in image.pieces) == image.nbytes
    first = 0
    for piece in image.pieces:
        expected = torch.stack([plain.layer(first + i) for i in range(2)]).view(torch.uint8)
        assert torch.equal(piece.rows(), expected)
        staged = torch.zeros_like(expected)
        piece.copy_to(staged)
        assert torch.equal(staged, expected)
        first += piece.num_layers


def test_image_copy_to_memory_of_another_size_is_refused() -> None:
    plain, _ = make_image(8, torch.float32)
    for wrong in (plain.nbytes - 1, plain.nbytes + 1):
        with pytest.raises(AssertionError, match=str(plain.nbytes)):
            plain.copied_to([torch.zeros(wrong, dtype=torch.uint8)])


def test_image_build_refuses_wrong_matrix_shapes() -> None:
    layout = AdapterLayout.build(8, SHAPES[:1])
    matrices = torch.zeros(24, 256), torch.zeros(400, 8)
    with pytest.raises(AssertionError, match="qkv_proj"):
        AdapterImage.build(layout, 1, lambda *_: matrices, torch.float32, 1.0)


def test_kv_planes_refuse_slots_without_whole_weights() -> None:
    pool = [[torch.zeros(10, 1, 3, dtype=torch.uint8)]]
    with pytest.raises(ValueError, match="3 bytes"):
        KVPlanes(pool, torch.float32)


def test_kv_planes_refuse_slots_of_unequal_size() -> None:
    with pytest.raises(ValueError, match=r"\[128, 256\] bytes"):
        KVPlanes([[torch.zeros(10, 1, 32)], [torch.zeros(10, 2, 32)]], torch.float32)


def test_kv_planes_refuse_a_non_contiguous_pool() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        KVPlanes([[torch.zeros(32, 10, 64).transpose(0, 1)]], torch.float32)
