"""Requests meant to crash or hang the server, or to get another's answer: each fails alone."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.adapters import ALL_LINEAR
from sglang_elora.testbed.server import ServerProcess
from tests.harness.bad_adapters import edit_config, edit_weights
from tests.harness.client import MODEL, Client, run
from tests.harness.control import adapter as row_of
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

NAMES = ("qv-r4", "attention-r8")
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}


BEYOND = "<|beyond|>"
"""A token of the tokenizer that the model has no embedding for."""


@pytest.fixture(scope="module")
def server(
    checkpoint: Path,
    adapters: dict[str, Path],
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    base = shutil.copytree(checkpoint, tmp_path_factory.mktemp("hostile") / "base")
    _add_token(base / "tokenizer.json", BEYOND)
    given = {name: adapters[name] for name in NAMES}
    flags = ["--elora", "--elora-check", *server_flags(base, given)]
    flags += ["--max-queued-requests", "64", "--max-lora-rank", "64"]
    flags += ["--lora-target-modules", *ALL_LINEAR]
    with ServerProcess(flags, log_path=logs / "hostile.log") as server:
        yield server


@pytest.fixture(autouse=True)
def served_on(
    server: ServerProcess, reference: Reference, prompts: Sequence[list[int]]
) -> Iterator[None]:
    """After each test: no request uses an adapter, and answers are right."""
    yield
    assert server.returncode is None, server.log_tail()

    run(server.url, lambda client: assert_right(client, reference, prompts[0]))


def _add_token(path: Path, token: str) -> None:
    tokenizer = json.loads(path.read_text())
    vocab_size = len(tokenizer["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": vocab_size, "content": token, **flags})
    path.write_text(json.dumps(tokenizer))


async def assert_right(client: Client, reference: Reference, prompt: list[int]) -> None:
    """No request uses an adapter, and the answers of the base model and of both adapters."""
    for name in (None, *NAMES):
        if name is not None:
            assert (await _settled(client, name))["num_requests"] == 0
        answer = await client.generate(name, prompt, num_tokens=8)
        assert list(answer.token_ids) == reference.generate(name, prompt, num_tokens=8)


async def _settled(client: Client, name: str) -> dict[str, Any]:
    for _ in range(100):
        row = await row_of(client, name)
        if row["num_requests"] == 0:
            break
        await asyncio.sleep(0.1)
    return row


ONE, TWO = [5, 6], [[5, 6], [7, 8]]
_LOGPROBS = {"input_ids": ONE, "return_logprob": True}


def _sampled(**params: Any) -> dict[str, Any]:
    return {"input_ids": ONE, "sampling_params": {**SHORT, **params}}


MALFORMED: dict[str, dict[str, Any]] = {
    "a list for one prompt": {"input_ids": ONE, "lora_path": ["qv-r4"]},
    "an empty list": {"input_ids": ONE, "lora_path": []},
    "None in a list": {"input_ids": ONE, "lora_path": [None]},
    "too few names": {"input_ids": TWO, "lora_path": ["qv-r4"]},
    "too many names": {"input_ids": TWO, "lora_path": ["qv-r4"] * 3},
    "a list in a list": {"input_ids": TWO, "lora_path": [["qv-r4"], "qv-r4"]},
    "a number": {"input_ids": ONE, "lora_path": 5},
    "an object": {"input_ids": ONE, "lora_path": {"name": "qv-r4"}},
    "an id": {"input_ids": ONE, "lora_id": "qv-r4"},
    "a name nobody knows": {"input_ids": ONE, "lora_path": "nobody"},
    "a name nobody knows in a list": {"input_ids": TWO, "lora_path": ["qv-r4", "nobody"]},
    "a long name": {"input_ids": ONE, "lora_path": "x" * 100_000},
    "a long session": {"input_ids": ONE, "session_id": "x" * 100_000},
    "a session that is a number": {"input_ids": ONE, "session_id": 5},
    "sampling for others": {"input_ids": ONE, "sampling_params": [SHORT]},
    "sampling for too few": {"input_ids": TWO, "sampling_params": [SHORT]},
    "logprobs for others": {"input_ids": ONE, "return_logprob": [True]},
    "logprobs for too few": {"input_ids": TWO, "return_logprob": [True]},
    "top logprobs for others": {"input_ids": ONE, "return_logprob": True, "top_logprobs_num": [2]},
    "a processor for others": {"input_ids": ONE, "custom_logit_processor": ["x"]},
    "a priority that is text": {"input_ids": ONE, "priority": "high"},
    "a salt that is a list": {"input_ids": ONE, "extra_key": ["a", "b"]},
    "no tokens": {"input_ids": []},
    "no tokens of one prompt": {"input_ids": [[5], []]},
    "no text": {"text": ""},
    "no text of one prompt": {"text": ["a", ""]},
    "no embeddings": {"input_embeds": []},
    "a negative token": {"input_ids": [5, -6]},
    "a negative token of one prompt": {"input_ids": [[5], [-6]]},
    "a token above the vocabulary": {"input_ids": [5, 1_000_000]},
    "a text with a token above the vocabulary": {"text": f"a {BEYOND}"},
    "a text with a token above the vocabulary in a list": {"text": ["a", BEYOND]},
    "embeddings of another width": {"input_embeds": [[1.0, 2.0]]},
    "embeddings of two widths": {"input_embeds": [[1.0, 2.0], [1.0]]},
    "top logprobs above the vocabulary": {**_LOGPROBS, "top_logprobs_num": 1_000_000},
    "a negative number of top logprobs": {**_LOGPROBS, "top_logprobs_num": -3},
    "a negative start of logprobs": {**_LOGPROBS, "logprob_start_len": -100},
    "a bias that is text": _sampled(logit_bias={"5": "nan"}),
    "a bias beyond float32": _sampled(logit_bias={"5": 1e308}),
    "biases that are a list": _sampled(logit_bias=[5]),
    "ends that are text": _sampled(stop_token_ids=["a"]),
    "a top_k beyond int32": _sampled(temperature=1, top_k=10**30),
    "a temperature beyond float32": _sampled(temperature=1e300),
    "an answer without end": _sampled(max_new_tokens=10**30),
    "a penalty that is 0 in float32": _sampled(repetition_penalty=1e-300),
    "a penalty that takes logits to infinity": _sampled(repetition_penalty=1e-38),
    "a top_p that is 0 in float32": _sampled(temperature=1, top_p=1e-300),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused(server: ServerProcess, name: str) -> None:
    body = {"sampling_params": SHORT, **MALFORMED[name]}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post("/generate", json=body)
        streamed = http.post("/generate", json={**body, "stream": True})
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert streamed.status_code < 500
    assert "error" in streamed.text or streamed.status_code >= 400


def test_stop_token_ids_outside_the_vocabulary_are_ignored(server: ServerProcess) -> None:
    body = _sampled(stop_token_ids=[-5, 1_000_000], min_new_tokens=2)
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["output_ids"]) == SHORT["max_new_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": f"one {BEYOND}"}),
        ("/v1/completions", {"prompt": ["one", f"one {BEYOND}"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": BEYOND}]}),
    ],
)
def test_openai_endpoints_refuse_text_with_tokens_above_the_vocabulary(
    server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post(path, json={"model": MODEL, "max_tokens": 2, **body})
    assert answer.status_code == 400, answer.text
    assert "valid range is [0, 2048)" in answer.text


def test_completions_refuse_adapter_lists_of_the_wrong_length(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        for prompt, lora_path, right in (
            ("one", ["qv-r4"], False),
            (["one", "two"], ["qv-r4"], False),
            (["one", "two"], ["qv-r4", None], True),
        ):
            body = {"model": MODEL, "prompt": prompt, "lora_path": lora_path, "max_tokens": 2}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == (200 if right else 400), answer.text


ENDS = ("too long", "aborted", "cut off", "many samples", "a name nobody knows", "bad grammar")


@pytest.mark.parametrize("end", ENDS)
async def test_adapter_unloads_after_every_way_a_request_can_end(
    client: Client, adapters: dict[str, Path], end: str
) -> None:
    name = "qv-r4"
    http = client._http
    if end == "too long":
        body = {"input_ids": [5] * 100_000, "lora_path": name, "sampling_params": SHORT}
        assert (await client.post("/generate", body)).status_code == 400
    elif end == "aborted":
        body = {"input_ids": [5] * 50, "lora_path": name, "sampling_params": LONG}
        tasks = [asyncio.create_task(client.post("/generate", body)) for _ in range(48)]
        await asyncio.sleep(1)  # more than run at a time: some are queued
        assert (await client.post("/abort_request", {"abort_all": True})).status_code == 200
        await asyncio.gather(*tasks)
    elif end == "cut off":
        body = {
            "input_ids": [5] * 9,
            "lora_path": name,
            "sampling_params": LONG,
            "stream": True,
        }
        for _ in range(3):
            async with http.stream("POST", "/generate", json=body) as stream:
                await anext(stream.aiter_lines())
    elif end == "many samples":
        sampling = {**SHORT, "n": 4}
        body = {"input_ids": [5, 6, 7], "lora_path": name, "sampling_params": sampling}
        for _ in range(2):
            answer = await client.post("/generate", body)
            assert answer.status_code == 200 and len(answer.json()) == 4, answer.text
    elif end == "bad grammar":
        sampling = {**SHORT, "json_schema": '{"type": "nonsense"}'}
        body = {"input_ids": [5, 6], "lora_path": name, "sampling_params": sampling}
        assert (await client.post("/generate", body)).status_code in (200, 400)
    else:
        body = {"input_ids": TWO, "lora_path": [name, "nobody"], "sampling_params": SHORT}
        assert (await client.post("/generate", body)).status_code == 400
    unloaded = await asyncio.wait_for(client.post("/unload_lora_adapter", {"lora_name": name}), 60)
    assert unloaded.status_code == 200, unloaded.text
    body = {"input_ids": ONE, "lora_path": name, "sampling_params": SHORT}
    refused = await client.post("/generate", body)
    assert refused.status_code == 400, "an unloaded adapter is served"
    body = {"lora_name": name, "lora_path": str(adapters[name])}
    loaded = await asyncio.wait_for(client.post("/load_lora_adapter", body), 60)
    assert loaded.status_code == 200, loaded.text


@pytest.mark.parametrize(
    "change",
    [{"rank_pattern": {"(([a-z_0-9.]+)+)+!": 5}}, {"lora_alpha": 1e308}],
    ids=["endless expression", "scale that overflows"],
)
async def test_adapter_that_would_crash_the_server_is_refused(
    client: Client, adapters: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in adapters["qv-r4"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit_config(folder, **change)
    body = {"lora_name": "bad", "lora_path": str(folder)}
    answer = await asyncio.wait_for(client.post("/load_lora_adapter", body), 20)
    assert answer.status_code == 400 and next(iter(change)) in answer.text


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"top_p": 0.9},
        {"top_k": 5, "min_p": 0.1},
        {"temperature": 1, "n": 2},
        {"max_new_tokens": 0},
    ],
    ids=["greedy", "top-p", "top-k and min-p", "several answers", "no token"],
)
async def test_request_with_nan_logits_fails_alone(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
    tmp_path: Path,
    sampling: dict[str, Any],
) -> None:
    """An adapter within all bounds, which overflow when they are multiplied with each other."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["mlp-r64"], folder)
    edit_config(folder, lora_alpha=64 * 4096)
    edit_weights(folder, lambda ts: {name: 6e4 * t.sign() for name, t in ts.items()})
    name = NAMES[1]
    overflow = "overflow " + ", ".join(sampling)
    body = {"lora_name": overflow, "lora_path": str(folder)}
    loaded = await client.post("/load_lora_adapter", body)
    assert loaded.status_code == 200, loaded.text
    bad = {"input_ids": prompts[0], "lora_path": overflow, "return_logprob": True}
    bad["sampling_params"] = {"max_new_tokens": 8, **sampling}
    beside = [client.generate(name, prompts[i], num_tokens=24) for i in (0, 1)]
    refused, *answers = await asyncio.gather(client.post("/generate", bad), *beside)
    refused_alone = await client.post("/generate", bad)  # in a batch of its own
    for answer in (refused, refused_alone):
        assert answer.status_code == 400 and "NaN or infinite" in answer.text, answer.text
    for i, answer in enumerate(answers):
        expected = reference.generate(name, prompts[i], num_tokens=24)
        assert list(answer.token_ids) == expected
    row = await _settled(client, overflow)
    assert row["kv_tokens_device"] == 0, "KV of NaN was cached, which others would meet"
    unloaded = await client.post("/unload_lora_adapter", {"lora_name": overflow})
    assert unloaded.status_code == 200, unloaded.text


async def test_request_naming_an_adapter_is_answered_by_it_or_refused(
    client: Client, reference: Reference
) -> None:
    """By the id that /v1/models lists, or as a suffix of the base model's, on each endpoint."""
    name = "attention-r8"
    prompt = "The train to the harbour"
    by_colon = await client.complete(f"{MODEL}:{name}", prompt, num_tokens=8)
    by_id = await client.complete(name, prompt, num_tokens=8)
    base = await client.complete(MODEL, prompt, num_tokens=8)
    assert by_colon.text == by_id.text != base.text
    listed = (await client.get("/v1/models")).json()["data"]
    for card in listed:
        assert (await client.get(f"/v1/models/{card['id']}")).json()["id"] == card["id"]
    assert (await client.get("/v1/models/nobody")).status_code == 404

    score = {"query": prompt, "items": [" a", " b"], "label_token_ids": [5, 6, 7]}
    scores = {}
    for model in (MODEL, name, f"{MODEL}:{name}"):
        answer = await client.post("/v1/score", {**score, "model": model})
        assert answer.status_code == 200, answer.text
        scores[model] = answer.json()["scores"]
    assert scores[name][0] == pytest.approx(scores[f"{MODEL}:{name}"][0], rel=1e-3)
    assert scores[name][0] != pytest.approx(scores[MODEL][0], rel=1e-2)
    unknown = await client.post("/v1/score", {**score, "model": f"{MODEL}:nobody"})
    assert unknown.status_code == 400 and "nobody" in unknown.text

    texts = {}
    for model in (MODEL, name, f"{MODEL}:{name}"):
        ask = {"model": model, "input": prompt, "temperature": 0, "max_output_tokens": 8}
        answer = await client.post("/v1/responses", ask)
        assert answer.status_code == 200, answer.text
        texts[model] = [item.get("content") for item in answer.json()["output"]]
    bare = {
        model: [[part["text"] for part in content or ()] for content in contents]
        for model, contents in texts.items()
    }
    assert bare[name] == bare[f"{MODEL}:{name}"] != bare[MODEL]
    ask = {"model": f"{MODEL}:nobody", "input": prompt, "max_output_tokens": 8}
    assert 400 <= (await client.post("/v1/responses", ask)).status_code < 500


@pytest.mark.parametrize("payload", [["AAAA"], [""], [], "AAAA", ["gASVBQAAAAAAAABDAXgu"]], ids=str)
def test_load_from_tensors_refuses_invalid_payloads(server: ServerProcess, payload: Any) -> None:
    body = {"lora_name": "sent", "config_dict": {"r": 4}, "serialized_named_tensors": payload}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post("/load_lora_adapter_from_tensors", json=body)
    assert 400 <= answer.status_code < 500, answer.text


async def test_memory_release_and_resume_are_refused_while_requests_run(client: Client) -> None:
    body = {"input_ids": [5] * 9, "lora_path": "qv-r4", "sampling_params": LONG}
    running = asyncio.create_task(client.post("/generate", body))
    await asyncio.sleep(0.5)
    assert (await client.post("/release_memory_occupation", {})).status_code == 400
    assert (await client.post("/resume_memory_occupation", {})).status_code == 400
    await client.post("/abort_request", {"abort_all": True})
    await running
    for _ in range(2):
        assert (await client.post("/release_memory_occupation", {})).status_code == 200
        assert (await client.post("/release_memory_occupation", {})).status_code == 400
        assert (await client.post("/resume_memory_occupation", {})).status_code == 200


async def test_pause_with_abort_ends_requests_of_an_earlier_pause(client: Client) -> None:
    body = {"input_ids": ONE, "sampling_params": LONG, "lora_path": "qv-r4"}
    held = asyncio.create_task(client.post("/generate", body))
    await asyncio.sleep(1)
    for mode in ("in_place", "abort", "retract", "abort"):
        paused = client.post("/pause_generation", {"mode": mode})
        assert (await asyncio.wait_for(paused, 20)).status_code == 200, mode
    assert (await held).json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert (await client.post("/continue_generation", {})).status_code == 200


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a negative token to decode": ("/v1/detokenize", {"tokens": [5, -6]}),
    "a huge token to decode": ("/v1/detokenize", {"tokens": [[5], [10**20]]}),
    "a token to decode above the vocabulary": ("/detokenize", {"tokens": [1_000_000]}),
    "an id for two inputs": ("/v1/embeddings", {"input": ["a", "b"], "rid": "one"}),
    "no messages to count": ("/v1/messages/count_tokens", {"messages": []}),
    "no messages": ("/v1/messages", {"messages": [], "max_tokens": 4}),
    "no chat": ("/v1/chat/completions", {"messages": []}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_endpoint_requests_are_refused(server: ServerProcess, name: str) -> None:
    path, body = REFUSED[name]
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post(path, json={"model": MODEL, **body})
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_refused_ollama_stream_returns_an_error(server: ServerProcess, path: str) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello"}
    body = {"model": MODEL, **asked, "stream": True, "options": {"top_p": 5}}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        answer = http.post(path, json=body)
    assert json.loads(answer.text.splitlines()[-1])["error"]


NOT_CALLED = {
    "/slow_down": "delays every later batch, as it should",
    "/start_profile": "writes a trace of the whole server",
    "/init_weights_update_group": "waits minutes for a peer, between two batches",
    "/init_weights_send_group_for_remote_instance": "waits minutes for a peer, between two batches",
}


def test_every_endpoint_serves_or_refuses_its_smallest_body(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http:
        schema = http.get("/openapi.json").json()
        called, failed = 0, {}
        for path, methods in schema["paths"].items():
            for method, operation in methods.items():
                if path in NOT_CALLED:
                    continue
                content = operation.get("requestBody", {}).get("content", {})
                body = content.get("application/json", {}).get("schema")
                answer = http.request(
                    method.upper(),
                    re.sub(r"{\w+}", "x", path),
                    json=None if body is None else smallest(body, schema),
                )
                called += 1
                if answer.status_code >= 500:
                    failed[method, path] = answer.text
    assert called > 100
    assert not failed


def smallest(field: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A value that a JSON schema allows, with what it demands and nothing more."""
    if "$ref" in field:
        return smallest(schema["components"]["schemas"][field["$ref"].split("/")[-1]], schema)
    if field.get("default") is not None:
        return field["default"]
    if "anyOf" in field:
        return smallest(field["anyOf"][0], schema)
    if "enum" in field or "const" in field:
        return field["enum"][0] if "enum" in field else field["const"]
    if field.get("type") == "object":
        required, fields = field.get("required", ()), field.get("properties", {})
        return {name: smallest(fields[name], schema) for name in required}
    values = {"array": [], "string": "x", "integer": 1, "number": 1.0, "boolean": True}
    return values.get(field.get("type", ""))
