"""The example of two replicas and SGLang's router: requests of one key go to one replica."""

from __future__ import annotations

import runpy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_elora.commands.cli import main
from sglang_elora.demo.many_chats import Plan
from sglang_elora.testbed.adapters import demo_adapters, make_adapters
from sglang_elora.testbed.server import free_port

pytest.importorskip("sglang_router", reason="needs the extra [router]")

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/two_replicas/run.py"))
NUM_ADAPTERS, NUM_TURNS = 12, 3
"""An adapter per session. The router assigns keys at random while it is idle, so few of them might
all be on one replica."""


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, models: Path) -> dict[str, Path]:
    return make_adapters(checkpoint, models / "of-replicas", demo_adapters(NUM_ADAPTERS))


@pytest.fixture(scope="module")
def urls(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[list[str]]:
    replica = EXAMPLE["replica"]
    with (
        replica(checkpoint, adapters, logs / "replica-1.log") as one,
        replica(checkpoint, adapters, logs / "replica-2.log") as two,
    ):
        yield [one.url, two.url]


def num_sessions(url: str) -> int:
    pool = httpx.get(f"{url}/elora/state", trust_env=False).json()["pool"]
    return int(pool["num_sessions"])


def wait_for_sessions(urls: list[str], count: int) -> None:
    """A session is closed a moment after its last answer has ended."""
    deadline = time.monotonic() + 20
    while (found := sum(num_sessions(url) for url in urls)) != count:
        assert time.monotonic() < deadline, (found, count)
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["session", "adapter", "round_robin"])
def test_router_keeps_requests_of_one_key_on_one_replica(
    name: str, urls: list[str], adapters: dict[str, Path], logs: Path
) -> None:
    plan = Plan(list(adapters), NUM_ADAPTERS, NUM_TURNS, mean_think_s=2.0)
    did: list[dict[str, Any]]
    did, record = EXAMPLE["play"](urls, EXAMPLE["ROUTES"][name], plan, logs / f"{name}.log")
    assert len(record.texts) == plan.num_requests and not record.failures
    assert sum(replica["requests"] for replica in did) == NUM_ADAPTERS * NUM_TURNS
    places = [replica["adapters"] for replica in did]
    if name == "round_robin":
        assert sum(places) > NUM_ADAPTERS, "adapters are on both"
    else:
        assert sum(places) == NUM_ADAPTERS and all(places)
        wait_for_sessions(urls, 0)  # their last turns ended them
        assert [replica["adapter_loads"] for replica in did] == places
        assert [replica["requests"] for replica in did] == [NUM_TURNS * n for n in places]
        assert all(replica["cached_tokens"] > 0 for replica in did)


def test_session_headers_pass_the_router_on_every_endpoint(
    urls: list[str], adapters: dict[str, Path], logs: Path
) -> None:
    name = next(iter(adapters))
    for url in urls:
        EXAMPLE["empty"](url, list(adapters))
    bodies = {
        "/v1/chat/completions": {
            "model": f"demo:{name}",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 4,
        },
        "/v1/completions": {"model": f"demo:{name}", "prompt": "hello", "max_tokens": 4},
        "/generate": {"text": "hello", "lora_path": name, "sampling_params": {"max_new_tokens": 4}},
    }
    log_path = logs / "session-headers.log"
    with EXAMPLE["router"](urls, EXAMPLE["ROUTES"]["session"], log_path) as front:
        EXAMPLE["wait_for_workers"](front.url)
        for i, (path, body) in enumerate(bodies.items()):
            for end, open_sessions in (("false", 1), ("true", 0)):
                headers = {EXAMPLE["ROUTING_KEY"]: str(i), EXAMPLE["SESSION"]: f"session-{i}"}
                headers[EXAMPLE["SESSION_END"]] = end
                answer = httpx.post(
                    f"{front.url}{path}", json=body, headers=headers, trust_env=False, timeout=60
                )
                assert answer.status_code == 200, answer.text
                wait_for_sessions(urls, open_sessions)


def test_no_request_is_lost_while_one_replica_is_drained(
    urls: list[str], adapters: dict[str, Path], logs: Path
) -> None:
    names, drained = list(adapters), urls[0]
    log_path = logs / "drained-replica.log"
    counts = EXAMPLE["counts"]
    with (
        httpx.Client(timeout=60, trust_env=False) as http,
        EXAMPLE["router"](urls, EXAMPLE["ROUTES"]["session"], log_path) as front,
    ):
        EXAMPLE["wait_for_workers"](front.url)

        def turns(sessions: range) -> dict[int, str]:
            """One turn of each session through the router; their answers."""
            answers = {}
            for session in sessions:
                key = f"drained-{session}"
                answer = http.post(
                    f"{front.url}/generate",
                    json={
                        "text": f"Question {session % len(names)}",
                        "lora_path": names[session % len(names)],
                        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
                    },
                    headers={EXAMPLE["ROUTING_KEY"]: key, EXAMPLE["SESSION"]: key},
                )
                assert answer.status_code == 200, answer.text
                answers[session % len(names)] = answer.json()["text"]
            return answers

        expected = turns(range(len(names)))
        assert all(num_sessions(url) for url in urls)
        http.post(f"{drained}/elora/drain", json={"refuse_after_s": 5}).raise_for_status()
        try:
            first, served = len(names), -1
            while not (
                http.get(f"{drained}/elora/drain").json()["refusing"]
                and counts(drained).requests == served
            ):
                served = counts(drained).requests
                assert turns(range(len(names))) == expected
                assert turns(range(first, first + len(names))) == expected  # new sessions
                first += len(names)
            assert http.get(f"{drained}/elora/drain").json()["num_requests"] == 0
        finally:
            http.delete(f"{drained}/elora/drain").raise_for_status()


@pytest.mark.parametrize("acts", [False, True], ids=["dry-run", "acts"])
def test_fleet_controller_brings_a_busy_adapter_to_the_other_replica(
    acts: bool, urls: list[str], adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(adapters))
    for url in urls:
        EXAMPLE["empty"](url, list(adapters))

    def tier(url: str) -> str:
        found = httpx.get(f"{url}/elora/state", params={"lora_name": name}, trust_env=False)
        (row,) = found.json()["adapters"]
        return str(row["tier"])

    def ask() -> None:
        body = {"text": "hello", "lora_path": name, "sampling_params": {"max_new_tokens": 4}}
        answer = httpx.post(f"{urls[0]}/generate", json=body, trust_env=False, timeout=60)
        assert answer.status_code == 200

    rounds = ["--interval", "0.5", "--rounds", "8", *([] if acts else ["--dry-run"])]
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(main, ["fleet", "--url", urls[0], "--url", urls[1], *rounds])
        while not done.done():
            ask()
        assert done.result() == 0
    assert tier(urls[0]) == "device"
    assert (tier(urls[1]) == "device") == acts
    orders = capsys.readouterr().out
    assert f"{urls[1]}: pin {name}: 2.00 of a server's load on 2 servers" in orders
    for url in urls:
        httpx.post(f"{url}/elora/unpin", json={"lora_name": name}, trust_env=False)


def test_fleet_controller_ends_if_no_server_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no server has answered" in capsys.readouterr().err
