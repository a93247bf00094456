"""Fixtures of the tests of adapters: a tiny base model, and an adapter of it to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sglang_elora.adapters import BaseShapes
from tests.harness.peft_adapters import save_adapter, tiny_config


@pytest.fixture(scope="session")
def base() -> BaseShapes:
    return BaseShapes.from_config(tiny_config("Llama"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("saved") / "good")


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))
