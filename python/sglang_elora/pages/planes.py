"""The KV pool's memory, read and written as the pages of adapters."""

from __future__ import annotations

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
        self._numbers: list[int] = slots.tolist()
        # Per index, the end of the run of consecutive numbers that it belongs to.
        self._run_ends = list(range(1, len(self) + 1))
        for i in reversed(range(len(self) - 1)):
            if self._numbers[i + 1] == self._numbers[i] + 1:
                self._run_ends[i] = self._run_ends[i + 1]

    def __len__(self) -> int:
        return len(self._numbers)

    def run(self, start: int, end: int) -> int | None:
        """The first slot if slots ``start`` to ``end`` (exclusive) are consecutive, else None.

        O(1). None too where ``end`` is beyond the table: what follows is not the adapter's.
        """
        return self._numbers[start] if end <= self._run_ends[start] else None


class KVPlanes:
    """Each plane of each layer as rows of slots, in elements of the weights' dtype.

    Element ``o`` of an adapter in a plane lies in its slot ``o // slot_elems`` at
    ``o % slot_elems``. The KV cache may have another dtype: slots are bytes here.

    Args:
        planes: Per plane, per layer: a contiguous tensor ``[slots, ...]``.
        weight_dtype: Of the adapters.

    Raises:
        ValueError: A tensor is not contiguous, slots differ in size, planes differ in layers, or
            a slot does not hold a whole number of weights.
    """

    def __init__(self, planes: Sequence[Sequence[torch.Tensor]], weight_dtype: torch.dtype) -> None:
        sizes = {tensor[0].nbytes for plane in planes for tensor in plane}
        layers = {len(plane) for plane in planes}
        if len(sizes) != 1 or len(layers) != 1:
            raise ValueError(
                f"slots differ between planes or layers: {sorted(sizes)} bytes, "
                f"{sorted(layers)} layers"
            )
        (self.slot_bytes,), (self.num_layers,) = sizes, layers
        if self.slot_bytes % weight_dtype.itemsize:
            raise ValueError(
                f"{weight_dtype} weights do not fill a slot of {self.slot_bytes} bytes"
            )
        for tensor in (tensor for plane in planes for tensor in plane):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"the KV pool is not contiguous: shape {tuple(tensor.shape)} has strides "
                    f"{tensor.stride()}"
                )
        self.weight_dtype = weight_dtype
        self.slot_elems = self.slot_bytes // weight_dtype.itemsize
        self.num_planes = len(planes)
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
                    # NOTE: indexing by slots[full] would wait for the device to learn the number.
                    tail = source[full * self.slot_elems :].view(1, rest)
                    rows[:, :rest].index_copy_(0, slots[full : full + 1], tail)

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
