"""Bodies, paths and queries that schemathesis makes from the server's own OpenAPI document.

What a client sends gets an answer below HTTP 500, and the server goes on. OPENAPI_FULL=1 in the
environment tries about a thousand per test instead of a few hundred.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.adapters import ALL_LINEAR
from sglang_elora.testbed.server import ServerProcess
from tests.e2e.test_hostile_requests import NAMES, NOT_CALLED, assert_right
from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis

FULL = "OPENAPI_FULL" in os.environ
CASES = 20 if FULL else 4  # of an operation; those that take nothing have one
UNDER_WAY = "mlp-r24"
TIMEOUT_S = 40.0

_SKIPPED = {*NOT_CALLED, "/configure_logging"}  # writes what it is sent into files of any name
_UNDONE_BY = ("/continue_generation", "/resume_memory_occupation", "/end_weight_update")


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[ServerProcess]:
    named = {name: adapters[name] for name in NAMES}
    flags = ["--elora", "--elora-check", *server_flags(checkpoint, named)]
    flags += ["--max-queued-requests", "64", "--max-lora-rank", "64", "--context-length", "256"]
    flags += ["--lora-target-modules", *ALL_LINEAR, "--allow-auto-truncate"]
    with ServerProcess(flags, log_path=logs / "openapi.log") as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("under_way", [False, True], ids=["quiet", "adapters-under-way"])
async def test_no_schema_request_causes_a_server_error(
    server: ServerProcess,
    client: Client,
    under_way: bool,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where schemathesis leaves its examples
    rounds: Counter[tuple[int, ...]] = Counter()
    moves = [_undo]
    if under_way:
        moves.append(lambda http: rounds.update([_load_use_unload(http, adapters[UNDER_WAY])]))
    with _every(0.5, moves, server.url):
        codes, failed = _try_all(server.url)
    print(f"{codes.total()} requests: {sorted(codes.items())}, rounds {rounds}")
    assert not failed, "\n".join(failed[:20])
    assert server.returncode is None, server.log_tail()
    assert codes.total() > (1000 if FULL else 250) and codes[200] > 50 and codes[400] > 20
    assert rounds[200, 200, 200] > 3 or not under_way
    with httpx.Client(
        base_url=server.url, timeout=TIMEOUT_S, trust_env=False, limits=LIMITS
    ) as http:
        _undo(http)
    await assert_right(client, reference, prompts[0])


def _try_all(url: str) -> tuple[Counter[int], list[str]]:
    """Number of answers by status, and the requests that got none or a server error."""
    codes: Counter[int] = Counter()
    failed: list[str] = []

    def call(case: Any) -> None:
        began = time.monotonic()
        try:
            answer = case.call(timeout=TIMEOUT_S)
        except requests.RequestException as error:
            status, text = 0, repr(error)
        else:
            status, text = answer.status_code, answer.text
        codes[status] += 1
        if status in (0, *range(500, 600)):
            took = f"after {time.monotonic() - began:.1f} s"
            sent = f"{case.method} {case.path} {case.path_parameters} {case.query} {case.body!r}"
            failed.append(f"{sent[:2000]} -> {status} {text[:300]} {took}")

    some = settings(
        max_examples=CASES,
        derandomize=not FULL,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        if operation.path not in _SKIPPED:
            some(given(case=operation.as_strategy())(call))()
    return codes, failed


@contextmanager
def _every(
    interval_s: float, moves: Sequence[Callable[[httpx.Client], Any]], url: str
) -> Iterator[None]:
    """Inside, each of the moves is made again and again, by a thread of its own."""
    is_over = threading.Event()

    def repeat(move: Callable[[httpx.Client], Any]) -> None:
        with httpx.Client(
            base_url=url, timeout=2 * TIMEOUT_S, trust_env=False, limits=LIMITS
        ) as http:
            while not is_over.wait(interval_s):
                move(http)

    threads = [threading.Thread(target=repeat, args=(move,)) for move in moves]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _undo(http: httpx.Client) -> None:
    """What stops the server on purpose is not to last until the end of the test."""
    for path in _UNDONE_BY:
        http.post(path, json={})


def _load_use_unload(http: httpx.Client, path: Path) -> tuple[int, ...]:
    name = {"lora_name": "under-way"}
    body = {"input_ids": [5, 6, 7], "lora_path": "under-way", "sampling_params": {"temperature": 0}}
    answers = (
        http.post("/load_lora_adapter", json={**name, "lora_path": str(path)}),
        http.post("/generate", json=body),
        http.post("/unload_lora_adapter", json=name),
    )
    return tuple(answer.status_code for answer in answers)
