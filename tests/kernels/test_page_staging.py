"""Adapters are written to the pool through a staging buffer of fixed size, for any rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_elora.pages import AdapterImage, AdapterLayout, KVPlanes, ModuleShape, SlotTable
from sglang_elora.pages.image import PIECE_BYTES
from tests.harness.kernel_world import DEVICE, ORDERS
from tests.harness.specializations import Launches

SMALL = (ModuleShape("qkv_proj", 96, (128, 64, 64)), ModuleShape("o_proj", 100, (96,)))
LARGE = (ModuleShape("down_proj", 28672, (8192,)), ModuleShape("o_proj", 8192, (8192,)))


class Allocations(TorchDispatchMode):
    """Names operations with a result on the device in memory that none of their arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        mine = {_storage(x) for x in args if isinstance(x, torch.Tensor)}
        results = result if isinstance(result, list | tuple) else [result]
        tensors = [x for x in results if isinstance(x, torch.Tensor)]
        if any(x.device.type == DEVICE and _storage(x) not in mine for x in tensors):
            self.names.append(str(func))
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def make_pool(num_slots: int, num_layers: int, num_planes: int) -> list[list[torch.Tensor]]:
    return [
        [
            torch.full((num_slots, 256), 7, dtype=torch.uint8, device=DEVICE)
            for _ in range(num_layers)
        ]
        for _ in range(num_planes)
    ]


def make_image(
    shapes: tuple[ModuleShape, ...], rank: int, num_layers: int, num_planes: int
) -> AdapterImage:
    layout = AdapterLayout.build(rank, shapes, num_planes)
    numbers = torch.arange(num_layers * sum(layout.plane_elems), dtype=torch.int32)
    content = numbers.to(torch.int16).view(torch.uint8)
    chunks = content.split([len(content) // 3, len(content) - len(content) // 3])
    return AdapterImage(layout, torch.bfloat16, num_layers, chunks, 1.0, "numbers")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_planes", [1, 2])
@pytest.mark.parametrize("limit", [300, 1024, 4096, 5000, 20000, 100000])
def test_staged_write_in_parts_of_any_size_equals_the_image(
    limit: int, num_planes: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is compared whole: padding and other slots keep their content."""
    for module in ("image", "planes"):
        monkeypatch.setattr(f"sglang_elora.pages.{module}.PIECE_BYTES", limit)
    image = make_image(SMALL, 5, 3, num_planes)
    needed = image.layout.num_slots(128, 1)
    numbers = ORDERS[order](needed, 2)
    pools, calls = [], []
    for use_kernels in (True, False):
        pool = make_pool(needed + 5, 3, num_planes)
        planes = KVPlanes(pool, torch.bfloat16, use_kernels=use_kernels)
        planes.warm_up()
        called: list[Any] = []
        planes.write(
            SlotTable(torch.tensor(numbers, device=DEVICE)),
            image,
            before_slots=lambda called=called: called.append("slots"),
            after_piece=lambda end, size, called=called: called.append((end, size)),
        )
        pools.append(pool)
        calls.append(called)
    sizes = image.plane_bytes
    assert calls[0] == calls[1] == ["slots", *((end, sum(sizes)) for end in (1, 2, 3))]
    for pool in pools:
        for layer in range(3):
            for plane, part in enumerate(image.layer(layer).view(torch.uint8).split(sizes)):
                expected = torch.full((needed + 5, 256), 7, dtype=torch.uint8)
                flat = expected[numbers].view(-1)
                flat[: len(part)] = part
                expected[numbers] = flat.view(-1, 256)
                assert torch.equal(pool[plane][layer].cpu(), expected)


@pytest.mark.parametrize("num_planes", [1, 2])
def test_staged_write_after_warm_up_allocates_no_device_memory(
    num_planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one layer of an adapter larger than the staging buffer, and with layers smaller."""
    launches = Launches().record(monkeypatch)
    large = make_image(LARGE, 256, 1, num_planes)
    assert large.nbytes > PIECE_BYTES
    slots = torch.arange(large.layout.num_slots(128, 1), device=DEVICE)
    planes = KVPlanes(make_pool(len(slots), 9, num_planes), torch.bfloat16, use_kernels=True)
    planes.warm_up()
    table, small = SlotTable(slots), make_image(SMALL, 8, 9, num_planes)
    with Allocations() as allocations:
        planes.write(table, small)
        planes.write(table, large)
    assert allocations.names == []
    # On a CPU, only this distinguishes host from device memory.
    jobs = {arguments["jobs"].data_ptr() for _, arguments in launches.arguments}
    assert len(jobs) == 1 and len(launches.arguments) > 1 + 9 + 1
    assert len(launches.keys) == 1  # parts of a layer are compiled by warm-up too
