"""``page_copy`` against its reference: exact, in both directions, and no other slot is changed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from sglang_elora.kernels import Contiguous, PoolPlanes, page_copy, reference
from tests.harness.kernel_world import DEVICE
from tests.harness.specializations import Launches, unaligned

LAYERS, SLOTS = 3, 200
Planes = list[list[torch.Tensor]]


def make_planes(slot_bytes: int, num_planes: int = 2) -> Planes:
    """Slots of random bytes."""
    generator = torch.Generator().manual_seed(slot_bytes)
    return [
        [
            torch.randint(0, 256, (SLOTS, slot_bytes), dtype=torch.uint8, generator=generator).to(
                DEVICE
            )
            for _ in range(LAYERS)
        ]
        for _ in range(num_planes)
    ]


def copies_of(planes: Planes) -> Planes:
    return [[tensor.clone() for tensor in layers] for layers in planes]


def same(planes: Planes, others: Planes) -> bool:
    return all(
        torch.equal(tensor, other)
        for layers, other_layers in zip(planes, others, strict=True)
        for tensor, other in zip(layers, other_layers, strict=True)
    )


def make_copy(slots: Sequence[int], plane_bytes: Sequence[int], seed: int = 0) -> Contiguous:
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(
        0, 256, (LAYERS, sum(plane_bytes)), dtype=torch.uint8, generator=generator
    )
    table = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    return Contiguous(memory.to(DEVICE), table, tuple(plane_bytes))


def check(planes: Planes, copies: Sequence[Contiguous]) -> None:
    """Into the slots and out of them, as the reference does."""
    pool = PoolPlanes.of(planes)
    expected = copies_of(planes)
    for copy in copies:
        reference.page_copy(expected, copy.memory, copy.table, copy.plane_bytes, to_pool=True)
    page_copy(pool, copies, to_pool=True)
    assert same(planes, expected)

    out = [
        Contiguous(torch.zeros_like(copy.memory), copy.table, copy.plane_bytes) for copy in copies
    ]
    page_copy(pool, out, to_pool=False)
    for got, copy in zip(out, copies, strict=True):
        assert torch.equal(got.memory, copy.memory)
        read = torch.zeros_like(copy.memory)
        reference.page_copy(planes, read, copy.table, copy.plane_bytes, to_pool=False)
        assert torch.equal(read, copy.memory)
    assert same(planes, expected)


ORDERS = {
    "contiguous": list(range(7, 47)),
    "reverse": list(range(47, 7, -1)),
    "scattered": random.Random(0).sample(range(1, SLOTS), 40),
    "pages": [16 * page + i for page in (9, 2, 5) for i in range(16)][:40],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slot_bytes", [64, 128, 144, 2048, 30, 7])
def test_page_copy_handles_every_slot_order_and_partial_last_slot(
    slot_bytes: int, order: str
) -> None:
    """Whole slots, and a last one in part."""
    slots = ORDERS[order]
    whole = len(slots) * slot_bytes
    check(make_planes(slot_bytes), [make_copy(slots, (whole, whole))])
    check(make_planes(slot_bytes), [make_copy(slots, (whole - slot_bytes // 2, 3 * slot_bytes))])


def test_page_copy_copies_kv_of_one_token() -> None:
    check(make_planes(256), [make_copy([5], (256, 256))])


@pytest.mark.parametrize("num_planes", [1, 2])
def test_page_copy_handles_each_number_of_planes(num_planes: int) -> None:
    check(make_planes(256, num_planes), [make_copy(ORDERS["scattered"], (9000,) * num_planes)])


def test_page_copy_copies_several_items_in_one_launch() -> None:
    """Adapters and KV of different sizes in one launch."""
    numbers = random.Random(1).sample(range(1, SLOTS), 100)
    sizes = [(30, (7000, 4000)), (1, (256, 256)), (60, (15360, 15360)), (9, (64, 2304))]
    copies = []
    for seed, (count, plane_bytes) in enumerate(sizes):
        copies.append(make_copy([numbers.pop() for _ in range(count)], plane_bytes, seed))
    check(make_planes(256), copies)


@pytest.mark.parametrize("first_layer", [0, 1, 2])
def test_page_copy_copies_a_range_of_layers_only(first_layer: int) -> None:
    planes = make_planes(256)
    before = copies_of(planes)
    copy = make_copy(ORDERS["scattered"], (5000, 6000))
    last = first_layer + 1
    part = Contiguous(copy.memory[first_layer:last], copy.table, copy.plane_bytes)
    page_copy(PoolPlanes.of(planes), [part], to_pool=True, first_layer=first_layer)
    expected = copies_of(before)
    reference.page_copy(
        [layers[first_layer:last] for layers in expected],
        part.memory,
        copy.table,
        copy.plane_bytes,
        to_pool=True,
    )
    assert same(planes, expected)


def test_page_copy_handles_gaps_between_layers() -> None:
    wide = torch.randint(0, 256, (LAYERS, 4000), dtype=torch.uint8, device=DEVICE)
    table = torch.tensor(ORDERS["scattered"], dtype=torch.int32, device=DEVICE)
    copy = Contiguous(wide[:, 32:3232], table, (1600, 1600))
    planes, expected = make_planes(256), make_planes(256)
    page_copy(PoolPlanes.of(planes), [copy], to_pool=True)
    reference.page_copy(expected, copy.memory, table, copy.plane_bytes, to_pool=True)
    assert same(planes, expected)


def test_page_copy_of_nothing_changes_nothing() -> None:
    planes = make_planes(64)
    before = copies_of(planes)
    page_copy(PoolPlanes.of(planes), [], to_pool=True)
    page_copy(PoolPlanes.of(planes), [make_copy([], (0, 0))], to_pool=True)
    assert same(planes, before)


def test_page_copy_refuses_wrong_sizes() -> None:
    planes = make_planes(64)
    pool, before = PoolPlanes.of(planes), copies_of(planes)
    good = make_copy([1, 2], (128, 128))
    bad = [
        (make_copy([1, 2], (128, 129)), "do not fit 2 slots of 64 bytes"),
        (make_copy([1, 2], (128,)), "in 2 planes"),
        (Contiguous(good.memory[:, 1:], good.table, (128, 128)), "not uint8"),
        (Contiguous(good.memory[:2], good.table, (128, 128)), r"not uint8 \(3, 256\)"),
        (Contiguous(good.memory.half(), good.table, (128, 128)), "not uint8"),
        (Contiguous(good.memory, good.table.long(), (128, 128)), "int64, not contiguous int32"),
        (Contiguous(good.memory.T.contiguous().T, good.table, (128, 128)), "not adjacent"),
    ]
    for copy, text in bad:
        with pytest.raises(ValueError, match=text):
            page_copy(pool, [good, copy], to_pool=True)
    with pytest.raises(ValueError, match="layers 1 to 4 of 3"):
        page_copy(pool, [good], to_pool=True, first_layer=1)
    assert same(planes, before)


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_page_copy_words_are_no_wider_than_the_pool_alignment(
    offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel compiled for a wider alignment than the addresses have corrupts memory or traps."""
    planes = [
        [unaligned(4 * 64, offset, DEVICE).view(4, 64) for _ in range(LAYERS)] for _ in range(2)
    ]
    launches = Launches().record(monkeypatch)
    copy = make_copy(range(4), (48, 48))
    page_copy(PoolPlanes.of(planes), [copy], to_pool=True)
    ((_, arguments),) = launches.arguments
    assert arguments["ALIGNMENT"] == (offset or 16)
