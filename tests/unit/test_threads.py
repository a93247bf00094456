"""The CPU platform's number of OpenMP threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_elora.platforms.threads import VARIABLE, default_threads, set_default_threads


def model(folder: Path, hidden_size: int, intermediate_size: int) -> str:
    config = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("num_ranks", "num_cores", "threads"),
    [(1, 2, 1), (1, 1, 1), (1, 8, 7), (2, 8, 3), (4, 4, 1), (1, 96, 95)],
)
def test_large_model_gets_all_cores_but_one_shared_by_the_ranks(
    tmp_path: Path, num_ranks: int, num_cores: int, threads: int
) -> None:
    path = model(tmp_path, 4096, 14336)
    assert default_threads(path, num_ranks, num_cores) == threads
    assert default_threads("meta-llama/Llama-3.1-8B", num_ranks, num_cores) == threads
    assert default_threads(None, num_ranks, num_cores) == threads


def test_small_model_gets_one_thread_on_any_machine(tmp_path: Path) -> None:
    assert default_threads(model(tmp_path, 384, 768), 1, 96) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": null, "intermediate_size": 2}'])
def test_unreadable_config_counts_as_a_large_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert default_threads(str(tmp_path), 1, 8) == 7


@pytest.mark.parametrize("chosen", [VARIABLE, "SGLANG_CPU_OMP_THREADS_BIND"])
def test_threads_chosen_by_the_user_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    path = model(tmp_path, 384, 768)
    with monkeypatch.context() as patch:
        patch.setenv(chosen, "3")
        assert set_default_threads(path, 1) is None
    monkeypatch.setenv(VARIABLE, "")  # restored after the test
    assert set_default_threads(path, 1) == 1
