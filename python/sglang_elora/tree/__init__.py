"""The cache tree's own structures. Nothing here imports sglang or torch."""

from __future__ import annotations

__all__ = ["LeafOrder"]

from sglang_elora.tree.leaf_order import LeafOrder
