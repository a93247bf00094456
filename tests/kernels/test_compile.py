"""The launch configurations compile for GPUs: wide loads, tensor cores, no registers spilled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WEIGHTS = ("bf16", "fp16", "fp32")
SHARED_BYTES_MAX = {80: 163 * 1024, 90: 227 * 1024}  # per block, CUDA C programming guide


@pytest.mark.parametrize("sm", SHARED_BYTES_MAX)
def test_kernels_compile_for_each_gpu_generation(sm: int, tmp_path: Path) -> None:
    """For A100 and H100 / H200, as Triton's compiler and NVIDIA's assembler see it."""
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run(
        [sys.executable, str(script), str(sm)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = {(line["kernel"], line.get("weights")) for line in lines}
    kernels = ("shrink", "routes", "expand", "logits", "lookup")
    lora = {(kernel, weights) for kernel in kernels for weights in WEIGHTS}
    assert compiled == {*lora, ("routed_tiles", None), ("page_copy", None)}
    for line in lines:
        assert line["stack_bytes"] <= 64 and line["local_bytes"] == 0, line
        assert line["shared_bytes"] <= SHARED_BYTES_MAX[sm], line
        # Single elements, a row of A apart, or a record, which is not a multiple of 16 bytes.
        if line["kernel"] in ("lookup", "routed_tiles"):
            continue
        assert line["wide_loads"] > 0, line
        if line["kernel"] == "page_copy":
            assert line["wide_stores"] > 0, line
        elif line["weights"] != "fp32":  # float32 is multiplied exactly, not by tensor cores
            assert line["tensor_core"] > 0, line
