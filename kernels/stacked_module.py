"""The shape of one target module, for which kernels are compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StackedModule:
    """A linear layer whose output may have parts: three for ``qkv_proj``, two for ``gate_up_proj``.

    Args:
        index: Position of the module in adapters' records.
        in_features: Elements of an input row.
        out_features: Elements of an output row, per part.
        in_stride: Elements from one row of A to the next. A is ``[parts * rank, in_features]``.
        out_strides: Per part, elements from one row of B's transpose to the next. Parts are
            adjacent, each ``[rank, out_features[part]]``.
        alignment: Common divisor of all offsets and strides of adapters' address spaces, in
            elements.
    """

    index: int
    in_features: int
    out_features: tuple[int, ...]
    in_stride: int
    out_strides: tuple[int, ...]
    alignment: int

    def inner_width(self, max_rank: int) -> int:
        """Columns of the result of ``lora_shrink``, a multiple of 16. Otherwise Triton would
        compile kernels for each rank separately."""
        return -(-len(self.out_features) * max_rank // 16) * 16
