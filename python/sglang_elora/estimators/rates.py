"""Rates of prefill and of copies from the host, fitted to measured times."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_elora.estimators.fit import DecayedFit


class PrefillCost:
    """Model of a prefill batch's seconds: a constant, a part per new token, and a part per (new
    token, token attended to).

    Args:
        seconds_per_token: Initial value.
    """

    def __init__(self, seconds_per_token: float = 40e-6) -> None:
        # On Llama-3-8B a token of context costs 1/30,000 of a new token: 4 * d * layers
        # against 2 * parameters operations.
        prior = (1e-3, seconds_per_token, seconds_per_token / 30_000)
        self._fit = DecayedFit(prior, scale=(1.0, 500.0, 500.0 * 500.0))
        self._usual_context = 0.0  # mean number of tokens before a computed one

    def add(self, requests: Iterable[tuple[int, int]], seconds: float) -> None:
        """Record a prefill batch and its time.

        Args:
            requests: (new tokens, tokens cached before them) of each request.
        """
        new = attended = 0.0
        for num_new, num_cached in requests:
            new += num_new
            attended += num_new * (num_cached + num_new / 2)
        self._fit.add((1.0, new, attended), seconds)
        share = max(0.01, 1 / self._fit.num_observations)
        self._usual_context += share * (attended / new - self._usual_context)

    def seconds(self, num_new: int, num_cached: int) -> float:
        """Seconds of a request alone in its batch."""
        constant, token, context = self._fit.coefficients()
        return constant + num_new * (token + context * (num_cached + num_new / 2))

    def rates(self) -> tuple[float, float]:
        """Seconds per additional token at the mean context length, and per batch without tokens.

        The first is well determined even where its two parts (per new token, per token of context)
        are not: batches with few new tokens after long contexts hardly separate them.
        """
        constant, token, context = self._fit.coefficients()
        return token + context * self._usual_context, constant


class LinkCost:
    """Model of the seconds of a copy from the host: a latency and a part per slot.

    Args:
        seconds_per_slot: Initial value.
        latency: Initial value, in seconds.
    """

    def __init__(self, seconds_per_slot: float = 2.4e-6, latency: float = 10e-6) -> None:
        self._fit = DecayedFit((latency, seconds_per_slot), scale=(1.0, 1000.0))

    def add(self, num_slots: int, seconds: float) -> None:
        self._fit.add((1.0, float(num_slots)), seconds)

    def rates(self) -> tuple[float, float]:
        """Seconds per slot, and latency per copy in seconds."""
        latency, slot = self._fit.coefficients()
        return slot, latency
