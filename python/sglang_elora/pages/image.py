"""An adapter's weights as one contiguous copy in host memory, ready to be laid into pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

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
class AdapterImage:
    """One adapter on one tensor-parallel rank.

    ``memory`` is ``[layers, sum of layout.plane_elems]`` of the weights' dtype: each layer holds
    its planes one after the other, so any run of layers is one piece. ``scaling`` is applied
    between A and B.

    ``pieces`` are runs of layers, uint8 ``[layers, bytes of a layer]``: of one layer at least, else
    within ``PIECE_BYTES`` and a share of ``1 / MIN_PIECES``. They are made here, once, because each
    start of a copy reads them on the scheduler's time.
    """

    layout: AdapterLayout
    memory: torch.Tensor
    scaling: float
    version: str  # names the content
    plane_bytes: tuple[int, ...] = field(init=False)  # of one layer
    pieces: tuple[torch.Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plane_bytes = tuple(n * self.memory.itemsize for n in self.layout.plane_elems)
        layers = min(PIECE_BYTES // sum(plane_bytes), len(self.memory) // MIN_PIECES)
        pieces = self.memory.view(torch.uint8).split(max(1, layers))
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
        *,
        pin_memory: bool = False,
        version: str | None = None,
    ) -> AdapterImage:
        """Copy all matrices to their places; padding is zero.

        Args:
            version: Names the content; by default a digest of this image.
        """
        memory = torch.zeros(
            num_layers, sum(layout.plane_elems), dtype=dtype, pin_memory=pin_memory
        )
        for layer in range(num_layers):
            planes = memory[layer].split(layout.plane_elems)
            a_plane, b_plane = planes[0], planes[-1]
            for name, place in layout.places.items():
                a, b = matrices(layer, name)
                _put(a_plane, place.a_offset, place.a_stride, a)
                start = 0
                for part, out in enumerate(place.shape.out_features):
                    rows = b[start : start + out].T
                    _put(b_plane, place.b_offsets[part], place.b_stride(part), rows)
                    start += out
                assert a.shape == (place.a_rows, place.shape.in_features), (name, a.shape)
                assert b.shape == (start, place.rank), (name, b.shape)
        return cls(layout, memory, scaling, version or _digest(layout, memory, scaling))

    @property
    def nbytes(self) -> int:
        return int(self.memory.nbytes)


def _digest(layout: AdapterLayout, memory: torch.Tensor, scaling: float) -> str:
    """Equal for equal weights, scaling and layout."""
    digest = hashlib.blake2b(repr((layout.rank, scaling)).encode(), digest_size=16)
    digest.update(repr(dict(layout.places)).encode())
    digest.update(memory.view(torch.uint8).numpy())
    return digest.hexdigest()


def _put(plane: torch.Tensor, offset: int, stride: int, matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    plane[offset : offset + rows * stride].view(rows, stride)[:, :columns] = matrix
