"""The frontend language: requests sent with and without adapters, and traced adapters.

Programs run in a process of their own (``lang_programs.py``) against an HTTP server that writes
down each request and answers by rule, so that stock and patched frontends can be compared word by
word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.programs import path
from tests.harness.run_python import RunPython

PROGRAM = path("lang_programs")


def _results(run_fresh_python: RunPython, which: str) -> Any:
    done = run_fresh_python("-W", "ignore", str(PROGRAM), which)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_frontend_without_adapters_sends_the_same_requests_as_stock(
    run_fresh_python: RunPython,
) -> None:
    stock, ours = (_results(run_fresh_python, which) for which in ("stock", "plain"))
    assert len(stock["sent"]) > 15
    assert stock == ours
    assert not any("lora_path" in body for path, body in ours["sent"])
    assert {path for path, _ in ours["sent"]} == {"/generate"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), "adapters"],
        cwd=tmp_path_factory.mktemp("cwd"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1])


def test_frontend_request_names_its_adapter(found: Any) -> None:
    for program, sent in found["sent"].items():
        assert sent and all(body.get("lora_path") == "a" for _, body in sent), program


def test_fork_caches_prefix_only_for_adapters_shared_by_branches(found: Any) -> None:
    by_adapter = [body.get("lora_path") for body in found["fork"]]
    assert sorted(by_adapter) == ["a", "a", "a", "b", "c"], "and the two that share one do"


def test_program_parameter_named_lora_path_is_kept(found: Any) -> None:
    assert found["own"] == [["mine", None], ["mine", None]]


def test_backend_without_adapters_rejects_lora_path(found: Any) -> None:
    assert "takes no lora_path" in found["other backend"]


def test_failed_call_ends_its_program(found: Any) -> None:
    """Stock waits indefinitely for what is submitted after it."""
    assert found["error"] == {"at the call": "no such adapter", "text": "start", "synced": True}


def test_runtime_forwards_adapter_arguments(found: Any) -> None:
    assert found["runtime"] == [["a", 0], ["a", None]]


def test_trace_of_a_program_finds_all_its_adapters(found: Any) -> None:
    assert found["traces"] == {
        "steps": ["a", "b", "", "default"],
        "forks": ["a", "b", "c", "d", "c", "end"],
        "looks": ["a"],
        "measures": ["a"],
        "calls a method": ["a"],
        "raises": ["a"],
        "runs another": ["a"],
        "roles": ["a", "b"],
        "rows": ["a"],
    }
    assert found["ran for nothing"] == 0


def test_stock_server_gets_one_announcement_attempt(found: Any) -> None:
    assert found["announced to stock"] == 1
    assert found["announced with key"] == ["Bearer admin"]


# The script.
