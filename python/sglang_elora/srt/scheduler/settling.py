"""Completion of reads and copies, agreed on by all tensor-parallel ranks."""

from __future__ import annotations

import logging

from sglang_elora.srt.measured_costs import MeasuredCosts
from sglang_elora.srt.mem_cache.ranks import DIGEST_VALUES, are_equal, digest_values
from sglang_elora.srt.mem_cache.residency import AdapterChanged, Residency
from sglang_elora.swapper.adapter_copy import AdapterCopy, Copied
from sglang_elora.swapper.pending_hints import PendingHints
from sglang_elora.swapper.reading import Read

logger = logging.getLogger(__name__)


class Settling:
    """Completes reads and copies of one scheduler, at the same step on every rank.

    With several ranks a step has at most one agreement, which is an all-reduce.

    Args:
        residency: The adapters on the device and their images.
        measure: Records the times of copies.
        expected: Pending hints; failed adapters are removed from them.
    """

    def __init__(
        self, residency: Residency, measure: MeasuredCosts, expected: PendingHints
    ) -> None:
        self._residency, self._measure, self._expected = residency, measure, expected
        self._host, self._ranks = residency.host, residency.ranks
        self._errors: dict[str, BaseException] = {}
        self._has_agreed = False  # the ranks have agreed in this step

    def take_errors(self) -> dict[str, BaseException]:
        """Errors of adapters that failed since the last call, by adapter id."""
        if not self._errors:
            return self._errors
        errors, self._errors = self._errors, {}
        return errors

    def begin_step(self) -> None:
        """Complete reads and copies that have ended on every rank since the last step."""
        self._has_agreed = False
        if self._residency.copies or self._host.reading:
            self._settle()

    def confirm(self) -> None:
        """Confirm copies started in this step that were queued on every rank; undo the others.

        If the ranks have already agreed in this step, that happens in the next step.
        """
        started = [copy for copy in self._residency.copies.values() if not copy.confirmed]
        if self._ranks.is_alone:
            for copy in started:
                is_queued = copy.error is None
                self._settle_copy(copy, Copied.UNDER_WAY if is_queued else Copied.FAILED)
        elif started and not self._has_agreed:
            self._settle()

    def _settle(self) -> None:
        copies, reading = list(self._residency.copies.values()), self._host.reading
        values: list[int] = [copy.code for copy in copies]
        for adapter_id in reading:
            code = self._host.code(adapter_id)
            image = self._host.image_read(adapter_id) if code == Read.DONE else None
            values += [code, *digest_values(None if image is None else image.version)]
        agreed = self._ranks.least(values)
        self._has_agreed = True
        for copy, least in zip(copies, agreed, strict=False):
            self._settle_copy(copy, Copied(least))
        position = len(copies)
        for adapter_id in reading:
            least, *digests = agreed[position : position + 1 + DIGEST_VALUES]
            position += 1 + DIGEST_VALUES
            self._settle_read(adapter_id, Read(least), is_same=are_equal(digests))

    def _settle_copy(self, copy: AdapterCopy, code: Copied) -> None:
        if code == Copied.UNDER_WAY:
            copy.confirmed = True
            return
        if code == Copied.DONE and (seconds := copy.seconds()) > 0:
            self._measure.copied(copy.num_slots, seconds)
        failure = self._residency.settle(copy.adapter_id, code)
        if failure is not None:
            self._residency.core.counts.adapter_copies_failed += 1
            self._fail(copy.adapter_id, failure)

    def _settle_read(self, adapter_id: str, code: Read, *, is_same: bool) -> None:
        """Complete a read: add the image if all ranks have read the same content, otherwise record
        the error."""
        failure: BaseException | None = None
        image = self._host.image_read(adapter_id)
        if code == Read.DONE and image is not None:
            try:
                self._residency.check_content(adapter_id, image, is_same=is_same)
            except AdapterChanged as error:
                failure, code = error, Read.FAILED
        found = self._host.settle(adapter_id, code)
        if failure is None and isinstance(found, BaseException):
            failure = found
        if failure is not None:
            self._residency.core.counts.adapter_reads_failed += 1
            self._fail(adapter_id, failure)

    def _fail(self, adapter_id: str, failure: BaseException) -> None:
        logger.error("LoRA adapter %s: %s", self._residency.name_of(adapter_id), failure)
        self._errors[adapter_id] = failure
        self._expected.forget(adapter_id)  # otherwise it would be retried in each step
