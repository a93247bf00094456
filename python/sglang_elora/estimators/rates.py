"""What prefill and copies take on this machine, from what they took."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_elora.estimators.fit import DecayedFit


class PrefillCost:
    """Seconds of a prefill batch: a constant, one part per new token, one per token attended to.

    Args:
        seconds_per_token: To start with.
    """

    def __init__(self, seconds_per_token: float = 40e-6) -> None:
        # A token of context costs a 30,000th of a new token on Llama-3-8B: 4 * d * layers
        # against 2 * parameters operations.
        prior = (1e-3, seconds_per_token, seconds_per_token / 30_000)
        self._fit = DecayedFit(prior, scale=(1.0, 500.0, 500.0 * 500.0))
        self._usual_context = 0.0  # tokens before one that is computed

    def add(self, requests: Iterable[tuple[int, int]], seconds: float) -> None:
        """A batch took so long.

        Args:
            requests: (new tokens, tokens cached before them) of each.
        """
        new = attended = 0.0
        for num_new, num_cached in requests:
            new += num_new
            attended += num_new * (num_cached + num_new / 2)
        self._fit.add((1.0, new, attended), seconds)
        share = max(0.01, 1 / self._fit.num_observations)
        self._usual_context += share * (attended / new - self._usual_context)

    def seconds(self, num_new: int, num_cached: int) -> float:
        """Of a request alone in its batch."""
        constant, token, context = self._fit.coefficients()
        return constant + num_new * (token + context * (num_cached + num_new / 2))

    def rates(self) -> tuple[float, float]:
        """Seconds of one more token behind as many others as is usual, and of a batch without any.

        The first is known where its parts are not: batches in which long contexts meet few new
        tokens tell the two apart badly.
        """
        constant, token, context = self._fit.coefficients()
        return token + context * self._usual_context, constant


class LinkCost:
    """Seconds of a copy from the host: a latency and one part per slot.

    Args:
        seconds_per_slot: To start with.
    """

    def __init__(self, seconds_per_slot: float = 2.4e-6, latency: float = 10e-6) -> None:
        self._fit = DecayedFit((latency, seconds_per_slot), scale=(1.0, 1000.0))

    def add(self, num_slots: int, seconds: float) -> None:
        self._fit.add((1.0, float(num_slots)), seconds)

    def rates(self) -> tuple[float, float]:
        """Seconds per slot, and per copy."""
        latency, slot = self._fit.coefficients()
        return slot, latency
