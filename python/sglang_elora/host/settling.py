"""Reads and copies that have ended: what all tensor-parallel ranks agree on before they act."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from sglang_elora.host.measure import Measure
from sglang_elora.host.residency import AdapterChanged, Residency
from sglang_elora.pages import AdapterImage
from sglang_elora.swapper import AdapterCopy, Copied, Expected, Read

logger = logging.getLogger(__name__)


class Settling:
    """Completes reads and copies of one scheduler, at the same step on every rank.

    Args:
        residency: The adapters on the device and their images.
        measure: Learns what copies take.
        expected: Hints; a failed adapter is no longer expected.
    """

    def __init__(self, residency: Residency, measure: Measure, expected: Expected) -> None:
        self._residency, self._measure, self._expected = residency, measure, expected
        self._errors: dict[str, BaseException] = {}

    def take_errors(self) -> dict[str, BaseException]:
        """Why adapters failed since the last call, by adapter id."""
        errors, self._errors = self._errors, {}
        return errors

    def settle(self) -> None:
        copies, reading = list(self._residency.copies.values()), self._residency.host.reading
        codes = self._agree(
            [copy.code for copy in copies] + [self._residency.host.code(uid) for uid in reading]
        )
        for copy, code in zip(copies, codes, strict=False):
            if code != Copied.UNDER_WAY:
                if code == Copied.DONE and (seconds := copy.seconds()) > 0:
                    self._measure.copied(copy.num_slots, seconds)
                failure = self._residency.settle(copy.uid, Copied(code))
                self._note(copy.uid, failure, "adapter_copies_failed")
        for uid, code in zip(reading, codes[len(copies) :], strict=True):
            found = self._residency.host.settle(uid, Read(code))
            if isinstance(found, AdapterImage):
                try:
                    self._residency.check_content(uid, found)
                except AdapterChanged as error:
                    self._residency.host.drop(uid)
                    found = error
            self._note(uid, found, "adapter_reads_failed")

    def has_failed(self, copies: Iterable[AdapterCopy]) -> bool:
        """Whether one has already; with several ranks, whether it is to be found out together."""
        started = list(copies)
        if self._residency.cache.tp_world_size > 1:
            return bool(started)
        return any(copy.error is not None for copy in started)

    def _note(self, uid: str, found: Any, counted: str) -> None:
        if isinstance(found, BaseException):
            logger.error("LoRA adapter %s: %s", self._residency.name_of(uid), found)
            self._residency.core.counts[counted] += 1
            self._errors[uid] = found
            self._expected.forget(uid)  # or it would be tried again and again

    def _agree(self, codes: list[int]) -> list[int]:
        """The least of all ranks, one by one."""
        cache = self._residency.cache
        if cache.tp_world_size == 1:
            return codes
        tensor = torch.tensor(codes, dtype=torch.int64)
        cache._all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        agreed: list[int] = tensor.tolist()
        return agreed
