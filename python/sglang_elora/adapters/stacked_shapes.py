"""Check that the matrices of an adapter can be stacked as SGLang stacks them."""

from __future__ import annotations

import re
from collections.abc import Mapping

STACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Projections that are stacked into one matrix (qkv_proj, gate_up_proj, fused_qkv_a_proj_with_mqa,
in_proj_qkvz, in_proj_ba)."""
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.")


def why_not_stacked(shapes: Mapping[str, tuple[int, ...]], rank: int) -> str | None:
    """The first problem that would keep SGLang from stacking the tensors; None if there is none.

    Each A must be ``[rank, in_features]`` and each B ``[out_features, rank]``, and projections that
    become one module must have one input size. SGLang asserts all other properties of a shape;
    these would raise torch's RuntimeError, which running out of memory raises too.

    Args:
        shapes: Shapes by the tensors' stored names; names without ``.lora_A.`` or ``.lora_B.`` are
            ignored.
    """
    widths: dict[str, tuple[str, int]] = {}
    for name, shape in shapes.items():
        match = _FACTOR.match(name)
        if match is None:
            continue
        is_a = match["factor"] == "A"
        if len(shape) != 2 or shape[0 if is_a else 1] != rank:
            return f"{name!r} has shape {shape}, and the adapter's rank is {rank}"
        if is_a:
            first, width = widths.setdefault(_fused(match["module"]), (name, shape[1]))
            if width != shape[1]:
                return f"{name!r} has shape {shape}, and {first!r} has {width} columns"
    return None


def _fused(module: str) -> str:
    """A common name for the projections of a layer that are stacked into one module."""
    parent, _, leaf = module.rpartition(".")
    for group in STACKED:
        if leaf in group:
            return f"{parent}.{group[0]}"
    return module
