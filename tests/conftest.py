"""Fixtures shared by all tests: the demo checkpoint family, built once per run."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.harness")

# A shell starts background jobs with Ctrl-C ignored, and all that they start inherits it. The tests
# interrupt processes on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small matrices, and several processes on few cores: more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Servers end when slots are lost or counted twice.
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE"] = "1"

# Kernels run under Triton's interpreter, on any machine; benchmarks/gpu/kernels.py runs their tests
# on a GPU. It is chosen when triton and the kernels are imported; servers do not inherit it.
os.environ["TRITON_INTERPRET"] = "1"
import_module("sglang_elora.kernels")
import_module("triton.experimental.gluon")  # at the first launch triton would
del os.environ["TRITON_INTERPRET"]

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402
from sglang_elora.testbed.checkpoint import make_checkpoint  # noqa: E402

ensure_torchvision_importable()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run under asyncio, as SGLang and our clients do."""
    return "asyncio"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for generated checkpoints and adapters."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def checkpoint(models: Path) -> Path:
    """The demo's Llama checkpoint: random weights, grouped-query attention, float32."""
    return make_checkpoint(models / "base")
