"""Frontend programs on a real server: each call is answered by the adapter it names."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import requests
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import compute_normalized_prompt_logprobs
from sglang.lang.ir import REGEX_INT

import sglang_elora.lang as elora
from sglang_elora.frontend.announcing import announcer_of
from sglang_elora.testbed.server import ServerProcess
from tests.harness.reference import Reference

# As an error, SGLang's warning would end the thread that gives it, and all would wait for that.
pytestmark = pytest.mark.filterwarnings("ignore:Error in stream_executor")

NUM_TOKENS = 12
GREEDY = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
THREE = ("attention-r8", "mlp-r24", "rslora-r8")
START = "The train to the harbour leaves at noon"
LONG = "Please compare the two letters and tell me which one was written first. " * 8


@pytest.fixture(scope="module")
def backend(elora_server: ServerProcess) -> Iterator[sgl.RuntimeEndpoint]:
    yield sgl.RuntimeEndpoint(elora_server.url)


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    return requests.post(server.url + path, json=body, timeout=60).json()


def generated(server: ServerProcess, adapter: str | None, text: str) -> str:
    """By a single request."""
    body = {"text": text, "lora_path": adapter, "sampling_params": GREEDY}
    answer: str = post(server, "/generate", body)["text"]
    return answer


@sgl.function
def one_call(s: Any, text: str, adapter: str | None = None) -> None:
    s += text
    s += sgl.gen("answer", lora_path=adapter)


def test_lang_call_is_answered_by_its_adapter(
    backend: sgl.RuntimeEndpoint, elora_server: ServerProcess, reference: Reference
) -> None:
    @sgl.function
    def steps(s: Any, text: str) -> None:
        s += text
        for name in THREE:
            s += sgl.gen(name, lora_path=name)
        s += sgl.gen("base")

    state = steps.run(text=START, backend=backend, **GREEDY)
    text = START
    for name in (*THREE, None):
        answer = state[name or "base"]
        assert answer == generated(elora_server, name, text)
        assert answer == reference.text(name, reference.tokenizer.encode(text), NUM_TOKENS)
        text += answer
    assert state.text() == text


def test_lang_call_overrides_the_runs_default_adapter(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    ids = reference.tokenizer.encode(START)
    for adapter, expected in ((None, THREE[0]), (THREE[1], THREE[1]), ("", None)):
        state = one_call.run(START, adapter, lora_path=THREE[0], backend=backend, **GREEDY)
        assert state["answer"] == reference.text(expected, ids, NUM_TOKENS)


def test_lang_program_parameter_named_lora_path_is_kept(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    @sgl.function
    def own(s: Any, lora_path: str) -> None:
        s += lora_path + sgl.gen("answer", lora_path=THREE[2])

    ids = reference.tokenizer.encode(START)
    expected = reference.text(THREE[2], ids, NUM_TOKENS)
    assert own.run(lora_path=START, backend=backend, **GREEDY)["answer"] == expected
    rows = [{"lora_path": START}] * 2
    for state in own.run_batch(rows, backend=backend, **GREEDY):
        assert state["answer"] == expected
    with pytest.raises(ValueError, match="a parameter of the program"):
        own.run_batch(rows, lora_path=THREE[0], backend=backend)


def test_lang_gen_int_and_gen_string_use_the_adapter(
    backend: sgl.RuntimeEndpoint, elora_server: ServerProcess
) -> None:
    @sgl.function
    def typed(s: Any, adapter: str) -> None:
        s += START + " number "
        s += sgl.gen_int("number", max_tokens=4, lora_path=adapter)
        s += " name "
        s += sgl.gen_string("name", max_tokens=6, lora_path=adapter)

    for name in THREE[:2]:
        state = typed.run(adapter=name, backend=backend, temperature=0)
        sampling = {"temperature": 0, "max_new_tokens": 4, "regex": REGEX_INT, "stop": [" ", "\n"]}
        body = {"text": START + " number ", "lora_path": name, "sampling_params": sampling}
        assert state["number"] == post(elora_server, "/generate", body)["text"]
        int(state["number"])
        assert state["name"].startswith('"')


def test_lang_select_scores_choices_with_the_adapter(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    choices = [" at the harbour", " in a letter"]

    @sgl.function
    def choose(s: Any, adapter: str | None, as_gen: bool) -> None:
        s += START
        if as_gen:
            call = sgl.gen("way", choices=choices, lora_path=adapter)
        else:
            call = sgl.select("way", choices, lora_path=adapter)
        s += call

    seen = set()
    for name in (None, *THREE):
        state = choose.run(adapter=name, as_gen=name is None, backend=backend)
        found = state.get_meta_info("way")
        for choice, tokens, normalized in zip(
            choices,
            found["input_token_logprobs"],
            found["normalized_prompt_logprobs"],
            strict=True,
        ):
            ids = reference.tokenizer.encode(START + choice)
            assert [token[1] for token in tokens] == ids[-len(tokens) :]
            expected = reference.logprobs(name, ids)[1 - len(tokens) :]
            assert [token[0] for token in tokens[1:]] == pytest.approx(expected, abs=2e-3)
            assert compute_normalized_prompt_logprobs(tokens) == pytest.approx(normalized, abs=2e-3)
        seen.add(round(found["normalized_prompt_logprobs"][0], 4))
    assert len(seen) == 1 + len(THREE), "the adapters differ, so what they say of a choice does"


@pytest.mark.parametrize("spelling", ["fork", "call"])
def test_lang_fork_branches_use_one_adapter_each(
    spelling: str, backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    @sgl.function
    def judges(s: Any) -> None:
        s += START
        if spelling == "fork":
            branches = s.fork(len(THREE), lora_path=THREE)
            branches += sgl.gen("verdict")
        else:
            branches = s.fork(len(THREE))
            branches += lambda i: sgl.gen("verdict", lora_path=THREE[i])
        branches.join()
        s += " so "
        s += sgl.gen("end", lora_path=THREE[0])

    state = judges.run(backend=backend, **GREEDY)
    ids = reference.tokenizer.encode(START)
    assert state["verdict"] == [reference.text(name, ids, NUM_TOKENS) for name in THREE]
    ids = reference.tokenizer.encode(START + " so ")
    assert state["end"] == reference.text(THREE[0], ids, NUM_TOKENS)


def test_lang_fork_refuses_fewer_adapters_than_branches(backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def uneven(s: Any) -> None:
        s.fork(3, lora_path=THREE[:2])

    with pytest.raises(ValueError, match="2 lora_path for 3 branches"):
        uneven.run(backend=backend)


def test_lang_prefix_is_cached_under_the_adapter(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    """The prefix of a fork's branches, and of a batch."""
    flush(backend)

    @sgl.function
    def twins(s: Any) -> None:
        s += LONG
        s.sync()  # SGLang asks whether there is a prefix before what is queued is in it
        s.fork(2, lora_path=THREE[0]).join()

    @sgl.function
    def rows(s: Any, word: str) -> None:
        s += "In short. " + LONG
        s += word
        s += sgl.gen("answer")

    @sgl.function
    def named(s: Any, word: str) -> None:
        s += "In brief. " + LONG
        s += sgl.gen("answer", lora_path=THREE[1]) + word

    def cached(adapter: str | None, text: str) -> bool:
        state = one_call.run(text, adapter, backend=backend, **GREEDY)
        num_cached: int = state.get_meta_info("answer")["cached_tokens"]
        return num_cached > len(reference.tokenizer.encode(text)) // 2

    twins.run(backend=backend).sync()
    rows.run_batch([{"word": word} for word in "ab"], lora_path=THREE[1], backend=backend, **GREEDY)
    named.run_batch([{"word": word} for word in "ab"], backend=backend, **GREEDY)
    for adapter, text in (
        (THREE[0], LONG),
        (THREE[1], "In short. " + LONG),
        (THREE[1], "In brief. " + LONG),
    ):
        assert not cached(None, text), "nothing was computed for the base model"
        assert cached(adapter, text)


def flush(backend: sgl.RuntimeEndpoint) -> None:
    for _ in range(50):  # refused while the last request is still being removed
        try:
            return backend.flush_cache()
        except RuntimeError:
            time.sleep(0.1)
    raise AssertionError("the cache was never idle")


def test_lang_batch_runs_each_program_with_its_adapter(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    ids = reference.tokenizer.encode(START)
    names = (*THREE, None)
    expected = [reference.text(name, ids, NUM_TOKENS) for name in names]
    rows = [{"text": START, "lora_path": name} for name in names]
    for state, answer in zip(
        one_call.run_batch(rows, backend=backend, **GREEDY), expected, strict=True
    ):
        assert state["answer"] == answer
    assert [row["lora_path"] for row in rows] == list(names), "rows can be run again"
    batch = one_call.run_batch(
        [(START,)] * len(names),
        lora_path=names,
        backend=backend,
        generator_style=True,
        **GREEDY,
    )
    assert [state["answer"] for state in batch] == expected


def test_lang_stream_equals_the_adapters_output(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    expected = reference.text(THREE[1], reference.tokenizer.encode(START), NUM_TOKENS)

    def begin() -> Any:
        return one_call.run(START, lora_path=THREE[1], stream=True, backend=backend, **GREEDY)

    assert "".join(begin().text_iter("answer")) == expected
    assert "".join(begin().text_iter()) == START + expected

    async def read(**options: Any) -> list[Any]:
        return [part async for part in begin().text_async_iter(**options)]

    assert "".join(asyncio.run(read(var_name="answer"))) == expected
    parts = asyncio.run(read(var_name="answer", return_meta_data=True))
    assert "".join(text for text, _ in parts) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_lang_unknown_adapter_raises_the_servers_error_and_ends(
    stream: bool, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def stray(s: Any) -> None:
        s += START
        s += sgl.gen("answer", lora_path="no-such-adapter")
        s += " and on "
        s += sgl.gen("more")

    state = stray.run(backend=backend, stream=stream, **GREEDY)
    done = threading.Thread(target=state.sync, daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive(), "it hangs"
    assert "no-such-adapter" in str(state.error())
    if not stream:
        with pytest.raises(RuntimeError, match="no-such-adapter"):
            state["answer"]
        with pytest.raises(RuntimeError, match="no-such-adapter"):
            state["more"]


def test_lang_adapters_alternating_on_one_prompt_share_no_kv(
    backend: sgl.RuntimeEndpoint, reference: Reference
) -> None:
    flush(backend)
    ids = reference.tokenizer.encode(LONG)
    for turn in range(2):
        for name in (None, *THREE):
            state = one_call.run(LONG, name, backend=backend, **GREEDY)
            assert state["answer"] == reference.text(name, ids, NUM_TOKENS)
            cached = state.get_meta_info("answer")["cached_tokens"]
            assert cached == 0 if turn == 0 else cached > len(ids) // 2


# Announcements.


def on_device(server: ServerProcess, name: str) -> bool:
    answer = requests.get(f"{server.url}/elora/state", {"lora_name": name}, timeout=20).json()
    return bool(answer["adapters"][0]["tier"] == "device")


def send_away(server: ServerProcess, *names: str) -> None:
    for name in names:
        deadline = time.monotonic() + 20
        while on_device(server, name):
            post(server, "/elora/evict", {"lora_name": name})
            assert time.monotonic() < deadline, name
            time.sleep(0.05)


def arrive(server: ServerProcess, names: Sequence[str]) -> None:
    deadline = time.monotonic() + 20
    while not all(on_device(server, name) for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.05)


def test_lang_hinted_adapters_are_loaded(
    backend: sgl.RuntimeEndpoint, elora_server: ServerProcess
) -> None:
    """Without a call that uses it: by a hint, and at a fork."""

    @sgl.function
    def hinting(s: Any) -> None:
        elora.hint(s, "no-such-adapter", THREE[0])

    @sgl.function
    def forking(s: Any) -> None:
        s.fork(2, lora_path=THREE[1:])

    for program, names in ((hinting, THREE[:1]), (forking, THREE[1:])):
        send_away(elora_server, *names)
        program.run(backend=backend)
        arrive(elora_server, names)


def test_lang_traced_program_announces_all_adapters_at_its_start(
    backend: sgl.RuntimeEndpoint, elora_server: ServerProcess
) -> None:
    @elora.traced
    @sgl.function
    def steps(s: Any) -> None:
        s += START + sgl.gen("first", max_tokens=500, lora_path=THREE[0])
        s += "\n" + s["first"] + sgl.gen("second", lora_path=THREE[1])
        s += f"\n{s['second']}" + sgl.gen("third", lora_path=THREE[2])

    send_away(elora_server, *THREE)
    state = steps.run(backend=backend, stream=True, **GREEDY)
    arrive(elora_server, THREE[1:])
    assert not state.stream_executor.variable_event["first"].is_set(), "still at the first call"
    state.sync()


def test_lang_queued_calls_are_announced(backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def queued(s: Any) -> None:
        s += START
        for name in THREE:
            s += sgl.gen(name, lora_path=name)
            s += sgl.gen(f"{name} again", lora_path=name)

    announcer = announcer_of(backend)
    assert announcer is not None
    announcer.drain()
    time.sleep(0.1)  # what was announced a moment ago is not announced again
    before = announcer.num_announced
    queued.run(backend=backend, **GREEDY).sync()
    announcer.drain()
    assert announcer.num_announced == before + 3, "once each, and the first ahead of the second"
    elora.prefetch(backend, False)
    queued.run(backend=backend, **GREEDY).sync()
    announcer.drain()
    assert announcer.num_announced == before + 3
    elora.prefetch(backend, True)
