"""The KV pool's memory, read and written as the pages of adapters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from sglang_elora.pages.image import AdapterImage


class PageTable:
    """The slots of one adapter, in the order of its addresses.

    Args:
        slots: int64 ``[num_slots]`` on the pool's device.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots
        numbers = slots.tolist()
        self._first = numbers[:1]  # first slot of each run of consecutive numbers
        self._starts = [0]  # and its index in the table
        for i in range(1, len(numbers)):
            if numbers[i] != numbers[i - 1] + 1:
                self._first.append(numbers[i])
                self._starts.append(i)

    def __len__(self) -> int:
        return len(self.slots)

    def run(self, start: int, end: int) -> int | None:
        """The first slot if slots ``start`` to ``end`` (exclusive) are consecutive, else None."""
        i = bisect_right(self._starts, start) - 1
        if i + 1 < len(self._starts) and self._starts[i + 1] < end:
            return None
        return int(self._first[i]) + start - self._starts[i]


class KVPlanes:
    """Each plane of each layer as rows of slots, in elements of the weights' dtype.

    Element ``o`` of an adapter in a plane lies in its slot ``o // slot_elems`` at
    ``o % slot_elems``. The KV cache may have another dtype: slots are bytes here.

    Args:
        planes: Per plane, per layer: a contiguous tensor ``[slots, ...]``.
        weight_dtype: Of the adapters.

    Raises:
        ValueError: A tensor is not contiguous, slots differ in size, or a slot does not hold a
            whole number of weights.
    """

    def __init__(self, planes: Sequence[Sequence[torch.Tensor]], weight_dtype: torch.dtype) -> None:
        sizes = {tensor[0].nbytes for plane in planes for tensor in plane}
        if len(sizes) != 1:
            raise ValueError(
                f"slots differ in size between layers or planes: {sorted(sizes)} bytes"
            )
        (self.slot_bytes,) = sizes
        if self.slot_bytes % weight_dtype.itemsize:
            raise ValueError(
                f"{weight_dtype} weights do not fill a slot of {self.slot_bytes} bytes"
            )
        if not all(tensor.is_contiguous() for plane in planes for tensor in plane):
            raise ValueError("the KV pool is not contiguous")
        self.weight_dtype = weight_dtype
        self.slot_elems = self.slot_bytes // weight_dtype.itemsize
        self.num_planes, self.num_layers = len(planes), len(planes[0])
        self._planes = [[self._as_weights(tensor) for tensor in plane] for plane in planes]

    def _as_weights(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.view(len(tensor), -1).view(torch.uint8)
        return rows.view(self.weight_dtype)  # [slots, slot_elems]

    def write(self, slots: torch.Tensor, image: AdapterImage) -> None:
        """Copy an adapter into its slots (int64 ``[num_slots]``), all layers and planes.

        What the image leaves of the last slots keeps its content.
        """
        for plane, layers in zip(image.planes, self._planes, strict=True):
            full, rest = divmod(plane.shape[1], self.slot_elems)
            for source, rows in zip(plane, layers, strict=True):
                source = source.to(rows.device, non_blocking=True)
                whole = source[: full * self.slot_elems].view(full, self.slot_elems)
                rows.index_copy_(0, slots[:full], whole)
                if rest:
                    rows[slots[full], :rest] = source[full * self.slot_elems :]

    def read(
        self, plane: int, layer: int, table: PageTable, offset: int, num_rows: int, stride: int
    ) -> torch.Tensor:
        """A matrix ``[num_rows, stride]``: a view of the pool where its slots are consecutive,
        else a copy of the slots it touches and no others.
        """
        rows = self._planes[plane][layer]
        first, shift = divmod(offset, self.slot_elems)
        end = -(-(offset + num_rows * stride) // self.slot_elems)
        run = table.run(first, end)
        if run is not None:
            touched = rows[run : run + end - first]
        else:
            touched = rows.index_select(0, table.slots[first:end])
        return touched.view(-1)[shift : shift + num_rows * stride].view(num_rows, stride)

    def is_view(self, plane: int, layer: int, tensor: torch.Tensor) -> bool:
        """Whether a tensor that ``read`` returned lies in the pool."""
        storage = self._planes[plane][layer].untyped_storage()
        return bool(tensor.untyped_storage().data_ptr() == storage.data_ptr())
