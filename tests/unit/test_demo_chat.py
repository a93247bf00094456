"""The chat driver against a server that only pretends, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from sglang_elora.demo.chat import (
    ChatPlan,
    hold_chats,
    system_prompt,
    user_message,
)
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult


class FakeModel(BaseHTTPRequestHandler):
    """Answers every chat with " one two", and the adapter "broken" with an error."""

    requests: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        adapter = request["model"].split(":")[1]
        self.send_response(500 if adapter == "broken" else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if adapter == "broken":
            self.wfile.write(b'{"message": "no such adapter"}')
            return
        pieces = [] if adapter == "mute" else ["", " one", " two"]
        for piece in pieces:
            self.send(choices=[{"index": 0, "delta": {"content": piece}}])
        turn = len(request["messages"]) // 2
        cached = {"cached_tokens": 10 * turn} if turn > 1 else None
        self.send(
            choices=[],
            usage={
                "prompt_tokens": 20 * turn,
                "completion_tokens": 2,
                "total_tokens": 20 * turn + 2,
                "prompt_tokens_details": cached,
            },
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, **chunk: Any) -> None:
        body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", **chunk}
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def url() -> Iterator[str]:
    FakeModel.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeModel)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def chats(url: str, *adapters: str, num_sessions: int = 4, num_turns: int = 3) -> list[TurnResult]:
    plan = ChatPlan(
        model="m",
        adapters=adapters,
        num_sessions=num_sessions,
        num_turns=num_turns,
        mean_think_s=0.001,
    )
    return asyncio.run(hold_chats(url, plan))


def test_chats_record_every_turn(url: str) -> None:
    results = chats(url, "a", "b")
    assert len(results) == 12
    for result in results:
        assert isinstance(result, TurnRecord)
        assert result.adapter == "ab"[result.session % 2]
        assert result.prompt_tokens == 20 * (result.turn + 1)
        assert result.cached_tokens == (10 * (result.turn + 1) if result.turn else 0)
        assert result.completion_tokens == 2
        assert 0 < result.ttft_s <= result.total_s
    assert {(r.session, r.turn) for r in results} == {(s, t) for s in range(4) for t in range(3)}


def test_chat_session_sends_its_own_history(url: str) -> None:
    chats(url, "a", "b", num_sessions=2, num_turns=2)
    second = next(
        request
        for request in FakeModel.requests
        if request["model"] == "m:b" and len(request["messages"]) == 4
    )
    assert [(message["role"], message["content"]) for message in second["messages"]] == [
        ("system", system_prompt("b")),
        ("user", user_message(1, 0)),
        ("assistant", " one two"),
        ("user", user_message(1, 1)),
    ]
    assert second["temperature"] == 0


@pytest.mark.parametrize(("adapter", "error"), [("broken", "500"), ("mute", "IncompleteAnswer")])
def test_chat_failure_ends_one_session_only(url: str, adapter: str, error: str) -> None:
    results = chats(url, "a", adapter, num_sessions=2)
    failures = [result for result in results if isinstance(result, TurnFailure)]
    assert [(f.session, f.adapter, f.turn) for f in failures] == [(1, adapter, 0)]
    assert error in failures[0].error
    assert len(results) == 4


def test_chat_with_an_unreachable_server_is_a_failure() -> None:
    results = chats("http://127.0.0.1:1", "a", num_sessions=1)
    assert [type(result) for result in results] == [TurnFailure]


@pytest.mark.parametrize(
    "wrong", [{"adapters": []}, {"num_sessions": 1}, {"num_turns": 0, "num_sessions": 2}]
)
def test_invalid_chat_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ChatPlan(**{"model": "m", "adapters": ["a", "b"], **wrong})
