"""The example on Ray Serve: real Ray, and a real server in each replica."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from sglang_elora.testbed.server import free_port
from tests.harness.client import MODEL, Client, run
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

if not find_spec("ray"):
    pytest.skip("needs the extra [ray]", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    # Of Ray's own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
EXAMPLE = Path(__file__).parents[2] / "examples/ray_serve"
NAMES = ("attention-r8", "mlp-r24", "rslora-r8", "all-r4", "qv-r4")
NUM_TOKENS = 12
BATCH = 4  # running requests of a server
MANY_CLIENTS = 14  # fewer than Serve's own policy scales for, and far more than a batch
FEW_CLIENTS = 3  # they leave the processor to a server that starts
LONG = 300  # tokens of an answer that is not complete when its server is killed
WAIT_S = 240.0


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, and none of them in other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "2")
        names = ("local", "routing", "app")  # ``local`` before Ray
        yield SimpleNamespace(**{name: import_module(name) for name in names})
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def deploy(
    example: SimpleNamespace, checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> Iterator[Callable[[str], str]]:
    """Deploys a release; returns the API's address. It begins with one replica."""
    given = {name: adapters[name] for name in NAMES}
    flags = ["--elora", *server_flags(checkpoint, given), "--max-running-requests", str(BATCH)]
    with example.local.local_ray(free_port()) as url:

        def deploy_release(release: str) -> str:
            application = example.app.application(
                flags, logs / "ray", model=MODEL, num_replicas=2, min_replicas=1, release=release
            )
            example.local.serve.run(application, name=example.local.NAME)
            return url

        yield deploy_release


@pytest.fixture(scope="module")
def url(deploy: Callable[[str], str]) -> str:
    return deploy("1")


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: Sequence[list[int]]) -> Mapping[str, list[int]]:
    return {name: reference.generate(name, prompts[0], NUM_TOKENS) for name in NAMES}


@pytest.fixture(scope="module")
def two_replicas(
    url: str, example: SimpleNamespace, expected: Mapping[str, list[int]], prompts: Any, logs: Path
) -> Outcome:
    """What the requests saw that made the application grow from one replica to two."""
    assert len(example.local.replicas()) == 1

    def wait_for_a_start() -> None:
        wait_until(lambda: len(list((logs / "ray").glob("server-*.log"))) == 2)

    outcome = while_asking(url, expected, prompts[0], wait_for_a_start, MANY_CLIENTS)
    wait_for_replicas(example, 2)
    return outcome


@dataclass(slots=True)
class Outcome:
    num_right: int = 0
    wrong: list[Any] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def wait_for_replicas(example: SimpleNamespace, count: int, without: str = "") -> None:
    def are_there() -> bool:
        names = [replica["replica"] for replica in example.local.replicas()]
        return len(names) == count and without not in names

    wait_until(are_there)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def while_asking(
    url: str,
    expected: Mapping[str, list[int]],
    prompt: Sequence[int],
    act: Callable[[], object],
    num_clients: int = FEW_CLIENTS,
) -> Outcome:
    """Run ``act`` while clients ask for all adapters but the last, half of them for streams."""
    outcome = Outcome()

    async def ask(client: Client, number: int) -> None:
        name, stream = NAMES[number % (len(NAMES) - 1)], number % 2 == 0
        try:
            answer = await client.generate(name, prompt, num_tokens=NUM_TOKENS, stream=stream)
        except (httpx.HTTPError, AssertionError, KeyError) as error:
            outcome.failures.append(repr(error))
            return
        if list(answer.token_ids) == expected[name]:
            outcome.num_right += 1
        else:
            outcome.wrong.append((name, answer))

    async def work(client: Client) -> None:
        acting = asyncio.create_task(asyncio.to_thread(act))

        async def ask_until_done(number: int) -> None:
            while not acting.done():
                await ask(client, number)

        await asyncio.gather(*map(ask_until_done, range(num_clients)))
        await acting

    run(url, work)
    return outcome


def states(example: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """State of each replica's server, by replica."""
    return {
        replica["replica"]: httpx.get(f"{replica['url']}/elora/state", trust_env=False).json()
        for replica in example.local.replicas()
    }


def visits(example: SimpleNamespace) -> list[Counter[str]]:
    """Of each replica's server: requests by adapter."""
    return [
        Counter({adapter["lora_name"]: adapter["visits"] for adapter in state["adapters"]})
        for state in states(example).values()
    ]


def server_with_running(example: SimpleNamespace, count: int) -> dict[str, Any]:
    """The replica whose server runs this many requests."""
    found: list[str] = []

    def is_found() -> bool:
        found[:] = [k for k, v in states(example).items() if v["pool"]["num_running"] == count]
        return bool(found)

    wait_until(is_found)
    return next(each for each in example.local.replicas() if each["replica"] == found[0])


def test_long_queues_in_the_engine_add_a_replica(two_replicas: Outcome) -> None:
    assert two_replicas.num_right > MANY_CLIENTS
    assert not two_replicas.wrong and not two_replicas.failures


def test_all_apis_answer_as_a_server_does(
    url: str, two_replicas: Outcome, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    name, text = NAMES[0], "The train to the harbour leaves at noon"
    expected = reference.text(name, reference.tokenizer.encode(text), NUM_TOKENS)
    messages = [{"role": "user", "content": text}]

    async def ask(client: Client) -> None:
        base = await client.generate(None, prompts[0], num_tokens=NUM_TOKENS)
        assert list(base.token_ids) == reference.generate(None, prompts[0], NUM_TOKENS)
        for stream in (False, True):
            model = f"{MODEL}:{name}"
            done = await client.complete(model, text, num_tokens=NUM_TOKENS, stream=stream)
            assert done.text == expected
        chats = [
            await client.chat(f"{MODEL}:{name}", messages, num_tokens=NUM_TOKENS, stream=stream)
            for stream in (False, True)
        ]
        assert chats[0].text == chats[1].text and chats[0].text
        listed = (await client.get("/v1/models")).json()["data"]
        assert {model["id"] for model in listed} == {MODEL, *NAMES}
        assert (await client.get("/health")).status_code == 200

    run(url, ask)


def test_errors_keep_their_status(url: str, two_replicas: Outcome) -> None:
    unknown = {"model": f"{MODEL}:nowhere", "prompt": "x", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        answer = http.post("/v1/completions", json=unknown)
        assert answer.status_code == 400 and "nowhere" in answer.text
        assert http.post("/generate", content=b"{not json").status_code == 400
        assert http.get("/elora/state").status_code == 404, "no replica's own endpoints"
        assert http.post("/close_session", json={}).status_code == 400


def test_a_chat_stays_on_one_replica_with_its_adapter(
    url: str, two_replicas: Outcome, example: SimpleNamespace, prompts: Sequence[list[int]]
) -> None:
    before = visits(example)

    async def ask(client: Client) -> None:
        for name in NAMES:
            for _ in range(4):
                await client.generate(name, prompts[0], num_tokens=1, session_id=f"chat-{name}")

    run(url, ask)
    done = [now - was for now, was in zip(visits(example), before, strict=True)]
    assert sum(done, Counter()) == dict.fromkeys(NAMES, 4)
    assert sum(len(+counts) for counts in done) == len(NAMES), done
    assert {NAMES[-1]: 4} in [+counts for counts in done], "new adapters go to the new replica"


def test_a_killed_server_gives_no_wrong_answer_and_is_replaced(
    url: str,
    two_replicas: Outcome,
    example: SimpleNamespace,
    reference: Reference,
    expected: Mapping[str, list[int]],
    prompts: Sequence[list[int]],
) -> None:
    """Of two long answers one is partly sent, which ends with an error, and one is repeated."""
    name, before = NAMES[0], example.local.front_counts()
    sampling = {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True}
    body = {"input_ids": prompts[0], "sampling_params": sampling, "lora_path": name}
    body["session_id"] = "long"
    with (
        ThreadPoolExecutor() as pool,
        httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as http,
    ):
        with http.stream("POST", "/generate", json={**body, "stream": True}) as streamed:
            lines = streamed.iter_lines()
            assert next(lines).startswith("data: {")
            whole = pool.submit(http.post, "/generate", json=body)
            victim = server_with_running(example, 2)
            processes = psutil.Process(victim["pid"]).children(recursive=True)
            os.kill(victim["pid"], signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert (
            "the replica ended while it answered"
            in json.loads(last.removeprefix("data: "))["error"]["message"]
        )
        outcome = while_asking(
            url,
            expected,
            prompts[0],
            lambda: wait_for_replicas(example, 2, without=victim["replica"]),
        )
        assert whole.result().json()["output_ids"] == reference.generate(name, prompts[0], LONG)
    assert not outcome.wrong and not outcome.failures and outcome.num_right > FEW_CLIENTS
    counts = {key: now - before[key] for key, now in example.local.front_counts().items()}
    assert counts["broken"] == 1 and counts["unavailable"] == 0 and counts["repeated"] > 0
    assert not [process for process in processes if process.is_running()]


def test_a_rolling_restart_loses_no_request(
    url: str,
    two_replicas: Outcome,
    deploy: Callable[[str], str],
    example: SimpleNamespace,
    expected: Mapping[str, list[int]],
    prompts: Sequence[list[int]],
) -> None:
    before = {replica["replica"] for replica in example.local.replicas()}

    outcome = while_asking(url, expected, prompts[0], lambda: deploy("2"))
    after = {replica["replica"] for replica in example.local.replicas()}
    assert len(after) == 2 and not before & after
    assert not outcome.wrong and not outcome.failures
    assert outcome.num_right > FEW_CLIENTS
