"""Logits rows with NaN or infinity are marked; other rows are unchanged."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def logits_check() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.scheduler import logits_check
    return logits_check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_check_marks_only_rows_with_nan_or_infinity(
    logits_check: Any, dtype: torch.dtype
) -> None:
    rows = torch.tensor(
        [
            [1.0, 2.0, 3.0],
            [1.0, math.nan, 3.0],
            [math.inf, 2.0, 3.0],
            [-math.inf, 2.0, -math.inf],  # a mask
            [math.nan] * 3,
        ],
        dtype=dtype,
    )
    output = SimpleNamespace(next_token_logits=rows.clone())
    logits_check.replace_rows_without_numbers(None, output)
    found = output.next_token_logits
    assert torch.equal(found[[0, 3]], rows[[0, 3]])
    assert not found[[1, 2, 4]].any()
    result = SimpleNamespace(logits_output=output, next_token_ids=torch.tensor([2, 0, 0, 1, 0]))
    sampled = result.next_token_ids
    logits_check.tell_host_of_marked_rows(None, None, None, None, result)
    assert result.next_token_ids.tolist() == [2, -1, -1, 1, -1]
    assert sampled.tolist() == [2, 0, 0, 1, 0], "the next batch's tokens exist"


@pytest.mark.parametrize(("lora_id", "status"), [(None, 500), ("a", 400)])
def test_logits_check_aborts_the_request_with_the_reason(
    logits_check: Any, lora_id: Any, status: int
) -> None:
    request = SimpleNamespace(lora_id=lora_id, finished_reason="matched")
    assert logits_check.end_with_the_reason(lambda *_: True, request, [5, -1])
    reason = request.finished_reason.to_json()
    assert reason["type"] == "abort" and reason["status_code"] == status
    assert "NaN or infinite" in reason["message"]
    ended = SimpleNamespace(lora_id=lora_id, finished_reason="matched")
    assert not logits_check.end_with_the_reason(lambda *_: False, ended, [5])
    assert ended.finished_reason == "matched"
