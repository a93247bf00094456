"""Activated LoRA (arXiv 2504.12397): adapters that act from a point of the prompt on.

Such an adapter names its invocation tokens. In a request, tokens before their last occurrence in
the prompt are computed without the adapter, so their KV is the base model's; from their first
token on, the adapter acts. A prompt without them is one of the base model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

ACTIVATED = "alora/"


class ActivatedNamespace(str):
    """Cache namespace of a request whose adapter acts from a point of its prompt on.

    Its text is the namespace of KV from ``start`` on; that of the KV before is ``base``.
    """

    base: str | None
    start: int
    """Tokens before the point, rounded down to whole pages; the text says how many were cut off."""

    @classmethod
    def of(
        cls, adapter_id: str, extra_key: str, base: str | None, start: int, page_size: int
    ) -> ActivatedNamespace:
        """The namespace of one request.

        Args:
            extra_key: The caller's.
            base: Namespace of requests of the base model with the same extra key.
            start: Tokens before the point.
        """
        made = cls(f"{ACTIVATED}{start % page_size}/{extra_key}/{adapter_id}")
        made.base, made.start = base, start - start % page_size
        return made


class ActivatedAdapter(str):
    """The id of a request's adapter which acts from token ``start`` of the prompt on."""

    start: int

    @classmethod
    def of(cls, adapter_id: str, start: int) -> ActivatedAdapter:
        made = cls(adapter_id)
        made.start = start
        return made


def is_activated(namespace: str | None) -> bool:
    """Whether KV in this namespace lies below KV of the base model, not below its adapter."""
    return namespace is not None and namespace.startswith(ACTIVATED)


def num_inactive(adapter_id: str | None, first: int, num_rows: int) -> int:
    """How many of a request's rows come before the point where its adapter begins to act.

    Args:
        first: Position in the prompt of the first row.
    """
    start = adapter_id.start if isinstance(adapter_id, ActivatedAdapter) else 0
    return min(max(start - first, 0), num_rows)


def last_occurrence(tokens: Sequence[int], sought: Sequence[int]) -> int | None:
    """Where ``sought``, which is not empty, begins last in ``tokens``; None if nowhere."""
    whole, part = array("q", tokens).tobytes(), array("q", sought).tobytes()
    size, end = array("q").itemsize, len(whole)
    while (at := whole.rfind(part, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + len(part) - 1
    return None
