"""Prefill of the CPU platform gives what SGLang's torch_native gives."""

from __future__ import annotations

import json

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython


@pytest.mark.parametrize(
    ("requests", "heads", "kv_heads", "window"),
    [
        ([(0, 7)], 4, 4, None),
        ([(40, 1), (0, 9), (17, 5)], 4, 2, None),
        ([(3, 30), (50, 14)], 8, 1, None),
        ([(3, 30), (50, 14)], 4, 2, 6),
    ],
)
def test_cpu_attention_prefill_after_a_cached_prefix_equals_the_reference(
    run_python: RunPython,
    requests: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    arguments = json.dumps([requests, heads, kv_heads, window])
    result = run_python("-c", source("cpu_attention"), arguments)
    assert result.returncode == 0, result.stderr
    difference, largest = json.loads(result.stdout)
    assert largest > 0.5
    assert difference < 1e-5
