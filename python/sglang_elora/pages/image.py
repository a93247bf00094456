"""An adapter's weights in host memory, laid out for copying into pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sglang_elora.pages.layout import AdapterLayout

PIECE_BYTES = 16 * 2**20
"""Largest piece copied at once, and size of the device's staging buffer. A piece of this size takes
0.3 ms over PCIe 5, so that launch overhead is negligible; raising it costs device memory."""

MIN_PIECES = 8
"""Pieces per adapter, at least (if it has as many layers). A forward pass can use a layer as soon
as its piece is copied: raising this lets it start earlier, at more launches per load."""

Matrices = Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]
"""Function (layer, module) -> (A ``[parts * rank, in_features]``,
B ``[sum of out_features, rank]``), with experts one after the other in the first dimension."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of whole layers of an image. ``parts`` are uint8, in order; several if the image's
    memory is not contiguous."""

    num_layers: int
    parts: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(part) for part in self.parts)

    def rows(self) -> torch.Tensor:
        """uint8 ``[num_layers, bytes of a layer]``: a view of one part, a copy of several."""
        whole = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return whole.view(self.num_layers, -1)

    def copy_to(self, rows: torch.Tensor, start: int = 0) -> None:
        """Fill ``rows``, uint8 ``[layers, bytes]`` on the device, with bytes from ``start`` on.

        The call does not wait for the copies: the piece's memory must not change before they end.
        """
        flat, filled = rows.view(-1), 0
        for part in self.parts:
            taken = part[start : start + len(flat) - filled]
            flat[filled : filled + len(taken)].copy_(taken, non_blocking=True)
            filled += len(taken)
            start = max(start - len(part), 0)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """One adapter's weights for one tensor-parallel rank.

    ``chunks`` are uint8 and hold, one after the other, the planes of each of ``num_layers`` layers;
    their borders may lie anywhere (``HostArena`` says why there are several). ``scaling`` is
    applied between A and B.

    ``pieces`` are runs of at least one layer, and of at most ``PIECE_BYTES`` and
    ``num_layers / MIN_PIECES`` layers. They are computed once, here, because the scheduler's thread
    reads them at each start of a copy.
    """

    layout: AdapterLayout
    dtype: torch.dtype
    num_layers: int
    chunks: tuple[torch.Tensor, ...]
    scaling: float
    version: str  # identifies the content
    plane_bytes: tuple[int, ...] = field(init=False)  # of one layer
    pieces: tuple[Piece, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plane_bytes = tuple(n * self.dtype.itemsize for n in self.layout.plane_elems)
        expected = self.num_layers * sum(plane_bytes)
        assert self.nbytes == expected, f"{self.nbytes} bytes are not {expected}"
        layers = max(1, min(PIECE_BYTES // sum(plane_bytes), self.num_layers // MIN_PIECES))
        counts = [
            min(layers, self.num_layers - first) for first in range(0, self.num_layers, layers)
        ]
        cuts = _split(self.chunks, [count * sum(plane_bytes) for count in counts])
        pieces = tuple(Piece(n, parts) for n, parts in zip(counts, cuts, strict=True))
        object.__setattr__(self, "plane_bytes", plane_bytes)
        object.__setattr__(self, "pieces", pieces)

    @classmethod
    def build(
        cls,
        layout: AdapterLayout,
        num_layers: int,
        matrices: Matrices,
        dtype: torch.dtype,
        scaling: float,
        chunks: Sequence[torch.Tensor] | None = None,
        version: str | None = None,
    ) -> AdapterImage:
        """An image with all matrices at their offsets and zeros as padding.

        Args:
            chunks: Memory to fill: uint8 ``[bytes]`` each, in total the image's size. By default
                newly allocated ordinary memory.
            version: Identifies the content; by default a digest of this image.
        """
        layer_bytes = sum(layout.plane_elems) * dtype.itemsize
        if chunks is None:
            chunks = [torch.empty(num_layers * layer_bytes, dtype=torch.uint8)]
        digest = hashlib.blake2b(repr((layout.rank, scaling)).encode(), digest_size=16)
        digest.update(repr(dict(layout.places)).encode())
        one_layer = torch.zeros(sum(layout.plane_elems), dtype=dtype)
        layers = _split(chunks, [layer_bytes] * num_layers)
        differ = any(place.shape.layers is not None for place in layout.places.values())
        for layer, parts in enumerate(layers):
            if differ:
                one_layer.zero_()  # what the last layer had there
            _fill(one_layer, layout, layer, matrices)
            content = one_layer.view(torch.uint8)
            if version is None:
                digest.update(content.numpy())
            for part, source in zip(parts, content.split([len(p) for p in parts]), strict=True):
                part.copy_(source)
        version = version or digest.hexdigest()
        return cls(layout, dtype, num_layers, tuple(chunks), scaling, version)

    @property
    def nbytes(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def layer(self, index: int) -> torch.Tensor:
        """A copy of the planes of one layer, ``[sum of layout.plane_elems]``."""
        size = sum(self.plane_bytes)
        return torch.cat(_split(self.chunks, [index * size, size])[1]).view(self.dtype)

    def copied_to(self, chunks: Sequence[torch.Tensor]) -> AdapterImage:
        """A copy of the image in ``chunks``: uint8 ``[bytes]`` each, in total the image's size."""
        sizes = [len(chunk) for chunk in chunks]
        for target, parts in zip(chunks, _split(self.chunks, sizes), strict=True):
            for part, place in zip(parts, target.split([len(p) for p in parts]), strict=True):
                place.copy_(part)
        return AdapterImage(
            self.layout, self.dtype, self.num_layers, tuple(chunks), self.scaling, self.version
        )


def _fill(
    one_layer: torch.Tensor,
    layout: AdapterLayout,
    layer: int,
    matrices: Matrices,
) -> None:
    """Write the matrices of one layer; the padding between them is not written."""
    planes = one_layer.split(layout.plane_elems)
    for name, place in layout.places.items():
        if not place.shape.is_in(layer):
            continue
        a, b = matrices(layer, name)
        assert a.shape == (place.a_rows, place.shape.in_features), (name, a.shape)
        outs, num_experts = place.shape.out_features, place.shape.num_experts
        assert b.shape == (num_experts * sum(outs), place.rank), (name, b.shape)
        a_plane, b_plane = planes[place.a_plane], planes[place.b_plane]
        _put(a_plane, place.a_offset, place.a_stride, a)
        if num_experts > 1:
            blocks = b.view(-1, outs[0], place.rank).transpose(1, 2)
            _put(b_plane, place.b_offsets[0], place.b_stride(0), blocks.reshape(-1, outs[0]))
            continue
        for part, rows in enumerate(b.split(outs)):
            _put(b_plane, place.b_offsets[part], place.b_stride(part), rows.T)


def _put(plane: torch.Tensor, offset: int, stride: int, matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    plane[offset : offset + rows * stride].view(rows, stride)[:, :columns] = matrix


def _split(chunks: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """Views of consecutive ranges of the chunks, of ``sizes`` bytes; each of one or more parts."""
    stretches = []
    index = offset = 0
    for size in sizes:
        parts = []
        while size:
            assert index < len(chunks), f"{sum(map(len, chunks))} bytes are not {sum(sizes)}"
            part = chunks[index][offset : offset + size]
            parts.append(part)
            size -= len(part)
            offset += len(part)
            if offset == len(chunks[index]):
                index, offset = index + 1, 0
        stretches.append(tuple(parts))
    return stretches
