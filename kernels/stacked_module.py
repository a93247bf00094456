"""Shape of one target module, as kernels are compiled for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StackedModule:
    """A linear layer whose output may have parts: three for ``qkv_proj``, two for ``gate_up_proj``.

    Args:
        index: The module's place in adapters' records.
        in_features: Elements of an input row.
        out_features: Elements of an output row, per part.
        in_stride: Elements from one row of A to the next. A is ``[parts * rank, in_features]``.
        out_strides: Per part, elements from one row of B's transpose to the next. Parts follow each
            other, each ``[rank, out_features[part]]``.
        alignment: Elements that all offsets and strides of adapters' address spaces are multiples
            of.
    """

    index: int
    in_features: int
    out_features: tuple[int, ...]
    in_stride: int
    out_strides: tuple[int, ...]
    alignment: int

    def inner_width(self, max_rank: int) -> int:
        """Columns between the halves: whole 16s, or each rank would have kernels of its own."""
        return -(-len(self.out_features) * max_rank // 16) * 16
