"""vLLM's sides of the benchmark, where an environment with vLLM is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.vllm.check import measure
from sglang_elora.bench.__main__ import VLLM_PYTHON, main

pytestmark = [
    pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason=f"{VLLM_PYTHON} names no interpreter"),
    pytest.mark.slow,
    pytest.mark.usefixtures("spawned_start"),
]


def test_outputs_with_lora_ops_replaced_equal_the_reference(tmp_path: Path) -> None:
    found = measure("vllm:6+grouped", Path(os.environ[VLLM_PYTHON]), tmp_path)
    assert {kind for kinds in found.values() for kind in kinds} == {"base model", "adapters"}
    for kinds in found.values():
        for row in kinds.values():
            assert row["requests"] > 0
            assert row["different"] == 0


def test_bench_measures_vllm_with_and_without_adapters(tmp_path: Path) -> None:
    options = ["--sides", "vllm:2+grouped", "--workloads", "chat", "--link", "none", "--base-only"]
    options += ["--adapters", "4", "--runs", "1", "--load", "0.3", "--duration", "6"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("chat-*.json"))]
    assert [row["trace"]["workload"]["name"] for row in rows] == ["chat-base", "chat"]
    for row in rows:
        assert row["side"] == "vllm:2+grouped"
        assert row["records"]
        for record in row["records"]:
            assert record["error"] is None
            assert len(record["output"]) >= 8
            assert record["num_prompt"] > record["num_cached"] >= 0
    assert "over base-only traffic" in (tmp_path / "tables.txt").read_text()
