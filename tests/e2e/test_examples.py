"""The examples, against a server that is up. (``two_replicas`` and ``ray_serve`` have
tests of their own.)"""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import sglang as sgl

from sglang_elora.testbed.adapters import copy_activated
from sglang_elora.testbed.server import ServerProcess
from tests.harness.reference import Reference

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("attention-r8", "mlp-r24", "rslora-r8", "all-r4", "qv-r4")
# As an error, SGLang's warning would end the thread that gives it, and all would wait for that.
pytestmark = pytest.mark.filterwarnings("ignore:Error in stream_executor")


class Checkers(NamedTuple):
    names: list[str]
    invocation: str
    num_tokens: int  # of the invocation


def shown_by(
    example: str,
    server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: Sequence[str] = NAMES,
) -> str:
    monkeypatch.setattr(sys, "argv", [example, "--url", server.url, "--adapters", *names])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(("example", "num_adapters"), [("router_agent", 5), ("parallel_judges", 4)])
def test_example_programs_run(
    example: str,
    num_adapters: int,
    elora_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = shown_by(example, elora_server, monkeypatch, capsys)
    assert all(name in shown for name in NAMES[:num_adapters])


@pytest.fixture
def checkers(
    elora_server: ServerProcess,
    checkpoint: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Checkers]:
    """Activated copies of ``NAMES``, loaded into the server."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    invocation = runpy.run_path(str(EXAMPLES / "activated_checkers.py"))["INVOCATION"]
    tokens = Reference(checkpoint, {}).tokenizer.encode(invocation, add_special_tokens=False)
    names = [f"check-{name}" for name in NAMES]
    with httpx.Client(base_url=elora_server.url, timeout=60, trust_env=False) as http:
        for name, original in zip(names, NAMES, strict=True):
            path = copy_activated(adapters[original], tmp_path / name, tokens)
            body = {"lora_name": name, "lora_path": str(path)}
            assert http.post("/load_lora_adapter", json=body).status_code == 200
        yield Checkers(names, invocation, len(tokens))
        for name in names:
            http.post("/unload_lora_adapter", json={"lora_name": name}).raise_for_status()


def test_example_checkers_share_the_kv_before_their_invocation(
    elora_server: ServerProcess,
    checkers: Checkers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = shown_by("activated_checkers", elora_server, monkeypatch, capsys, checkers.names)
    counts = re.findall(r"(\d+) of (\d+) prompt tokens found", shown)
    assert len(counts) == len(NAMES)
    for found, prompt in counts:  # all before the invocation, but the last token of the draft
        assert int(prompt) > 150 and int(found) >= int(prompt) - checkers.num_tokens - 1


def test_fork_into_activated_adapters_computes_its_prefix_once(
    elora_server: ServerProcess, checkers: Checkers
) -> None:
    """Nothing of the state is cached, and the program's client cannot know that its branches share
    KV: the server lets one of them compute it, and the others wait."""
    question = "What did the harbour master say to the second pilot about the tide? " * 8

    @sgl.function
    def asked(s: Any) -> None:
        s += question
        branches = s.fork(len(checkers.names), lora_path=checkers.names)
        branches += checkers.invocation + sgl.gen("verdict", max_tokens=4)
        branches.join()
        s.set_var("meta", [branch.get_meta_info("verdict") for branch in branches])

    state = asked.run(backend=sgl.RuntimeEndpoint(elora_server.url), temperature=0)
    found = sorted(meta["cached_tokens"] for meta in state["meta"])
    shared = state["meta"][0]["prompt_tokens"] - checkers.num_tokens
    assert shared > 150 and found[0] < 10
    assert all(count >= shared - 1 for count in found[1:])


def test_example_chat_hits_its_history_in_the_cache(
    elora_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = shown_by("chat", elora_server, monkeypatch, capsys)
    counts = [line.split() for line in shown.splitlines() if line.endswith("from the cache")]
    cached, prompts = ([int(words[i]) for words in counts] for i in (0, 2))
    assert len(counts) == 4
    # The model says anything, also what its tokenizer would write otherwise: answers may be missed.
    assert all(now > before for before, now in pairwise(cached))
    assert all(now > before for before, now in pairwise(prompts))


def test_example_gateway_serves_each_tenant_its_adapter(
    elora_server: ServerProcess,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = shown_by("tenant_gateway", elora_server, monkeypatch, capsys)
    *answered, refused = shown.splitlines()
    assert refused.startswith("a wrong key: 401")
    question = [{"role": "user", "content": "Where is the harbour?"}]
    ids = reference.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    for name, first in zip(NAMES[:2], answered[::2], strict=True):
        assert first.startswith(f"{name}: {reference.text(name, ids, 32)!r}")


@pytest.mark.parametrize(
    ("example", "package", "num_adapters"),
    [("langchain_chain", "langchain_openai", 2), ("litellm_calls", "litellm", 3)],
)
def test_example_clients_run(
    example: str,
    package: str,
    num_adapters: int,
    elora_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings():  # theirs
        warnings.simplefilter("ignore")
        pytest.importorskip(package, reason="needs the extra [clients]")
        shown = shown_by(example, elora_server, monkeypatch, capsys)
    answers = [line.split(": ", 1)[1] for line in shown.splitlines() if line.startswith("  ")]
    assert len(set(answers)) == num_adapters
    assert all(f"  {name}: " in shown for name in NAMES[:num_adapters])
