"""An adapter's weights in host memory, laid out to be copied into pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from sglang_elora.pages.layout import AdapterLayout

PIECE_BYTES = 16 * 2**20
"""Most of an adapter that is copied at once, and the device memory it passes through. A piece of
this size takes 0.3 ms over PCIe 5, so that its launches do not show."""

MIN_PIECES = 8
"""A layer can be computed with once its piece is there: so pieces are no more than this share."""

Matrices = Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(layer, module) -> A ``[parts * rank, in_features]`` and B ``[sum of out_features, rank]``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of whole layers of an image. ``parts`` are uint8, in order; several where the image's
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
        """Copy bytes from ``start`` on to uint8 ``[layers, bytes]`` on the device, all of it.

        The call does not wait for the copies: the piece's memory must not change before they ran.
        """
        flat, filled = rows.view(-1), 0
        for part in self.parts:
            taken = part[start : start + len(flat) - filled]
            flat[filled : filled + len(taken)].copy_(taken, non_blocking=True)
            filled += len(taken)
            start = max(start - len(part), 0)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """One adapter on one tensor-parallel rank.

    ``chunks`` are uint8 and hold, one after the other, ``num_layers`` times the planes of a layer;
    their borders may lie anywhere (``HostArena`` says why there are several). ``scaling`` is
    applied between A and B.

    ``pieces`` are runs of layers, of one layer at least, and at most ``PIECE_BYTES`` and a share of
    ``1 / MIN_PIECES``. They are made here, once, because each start of a copy reads them on the
    scheduler's time.
    """

    layout: AdapterLayout
    dtype: torch.dtype
    num_layers: int
    chunks: tuple[torch.Tensor, ...]
    scaling: float
    version: str  # names the content
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
        """Copy all matrices to their places; padding is zero.

        Args:
            chunks: Where to: uint8 ``[bytes]`` each, together as long as the image. By default
                ordinary memory.
            version: Names the content; by default a digest of this image.
        """
        layer_bytes = sum(layout.plane_elems) * dtype.itemsize
        if chunks is None:
            chunks = [torch.empty(num_layers * layer_bytes, dtype=torch.uint8)]
        digest = hashlib.blake2b(repr((layout.rank, scaling)).encode(), digest_size=16)
        digest.update(repr(dict(layout.places)).encode())
        one_layer = torch.zeros(sum(layout.plane_elems), dtype=dtype)
        layers = _split(chunks, [layer_bytes] * num_layers)
        for layer, parts in enumerate(layers):
            _fill(one_layer, layout, partial(matrices, layer))
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
        """The planes of one layer, ``[sum of layout.plane_elems]``, as a copy."""
        size = sum(self.plane_bytes)
        return torch.cat(_split(self.chunks, [index * size, size])[1]).view(self.dtype)

    def copied_to(self, chunks: Sequence[torch.Tensor]) -> AdapterImage:
        """The same image in other memory: uint8 ``[bytes]`` each, together as long as this."""
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
    matrices: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write the matrices of one layer; what lies between them is left as it is."""
    planes = one_layer.split(layout.plane_elems)
    a_plane, b_plane = planes[0], planes[-1]
    for name, place in layout.places.items():
        a, b = matrices(name)
        assert a.shape == (place.a_rows, place.shape.in_features), (name, a.shape)
        assert b.shape == (sum(place.shape.out_features), place.rank), (name, b.shape)
        _put(a_plane, place.a_offset, place.a_stride, a)
        for part, rows in enumerate(b.split(place.shape.out_features)):
            _put(b_plane, place.b_offsets[part], place.b_stride(part), rows.T)


def _put(plane: torch.Tensor, offset: int, stride: int, matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    plane[offset : offset + rows * stride].view(rows, stride)[:, :columns] = matrix


def _split(chunks: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """Views of the chunks, cut into stretches of so many bytes, each of one part or more."""
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
