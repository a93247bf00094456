"""Sessions named and ended by headers, and what a draining server refuses."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from sglang_elora import config
from sglang_elora.config import EloraConfig

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, _get_auth_level_from_app_and_scope
    from starlette.testclient import TestClient

    from sglang_elora.srt.tokenizer.drain import Drain, DrainOptions, is_ready
    from sglang_elora.srt.tokenizer.session_gate import (
        END_HEADER,
        RESPONSES,
        STARTS_NOTHING,
        SessionGate,
    )
    from sglang_elora.srt.tokenizer.session_names import SESSION_HEADER, header_session

CHAT = "/v1/chat/completions"


class World:
    """The gate around an app that answers with the body and the header's session that it got.

    Args:
        sessions: Those that the scheduler has KV of.
    """

    def __init__(self, sessions: Sequence[str] = ()) -> None:
        self.sessions, self.closed = list(sessions), list[str]()
        others = SimpleNamespace(handle=lambda *_: None, ask=self._no_others)
        self.manager: Any = SimpleNamespace(
            elora_workers=others,
            rid_to_state={},
            close_session=self._close,
            asyncio_tasks=set(),
        )
        control: Any = SimpleNamespace(ask=self._ask)
        self.drain = control.drain = Drain(self.manager, control)
        self.manager.elora = control
        server: Any = SimpleNamespace(state=SimpleNamespace(elora=control), routes=app.routes)
        self.client = TestClient(SessionGate(self._answer, server), base_url="http://127.0.0.1")

    def begin(self, session_idle_s: float = 60.0) -> Any:
        options = DrainOptions(refuse_after_s=0.0, session_idle_s=session_idle_s)
        return asyncio.run(self.drain.begin(options))

    def status(self) -> Any:
        return asyncio.run(self.drain.status())

    def post(self, path: str = CHAT, body: Any = None, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, json=body, headers=named)

    async def _no_others(self, *_: Any) -> list[Any]:
        return []

    async def _ask(self, request: Any) -> Any:
        return SimpleNamespace(sessions=self.sessions)

    async def _close(self, order: Any) -> None:
        self.closed.append(order.session_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            return await send({"type": "websocket.close"})
        body = (await receive())["body"]
        named = [(b"named", (header_session.get() or "").encode())]
        await send({"type": "http.response.start", "status": 200, "headers": named})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(autouse=True)
def no_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_active", EloraConfig(enabled=True))


def test_session_header_reaches_the_endpoint_of_its_own_request_only() -> None:
    world = World()
    assert world.post(**{SESSION_HEADER: "s1"}).headers["named"] == "s1"
    assert world.post().headers["named"] == ""


@pytest.mark.parametrize("name", ["", "x" * 1025])
def test_session_header_of_wrong_length_is_refused(name: str) -> None:
    answer = World().post(**{SESSION_HEADER: name})
    assert answer.status_code == 400 and "1024" in answer.json()["message"]


def test_end_header_closes_the_session_after_the_answer() -> None:
    world = World()
    for end, closed in (("", []), ("no", []), ("True", ["s1"])):
        assert world.post(**{SESSION_HEADER: "s1", END_HEADER: end}).status_code == 200
        assert world.closed == closed
    world.post(**{END_HEADER: "true"})
    assert world.closed == ["s1"]


def test_end_header_closes_the_session_of_a_request_that_fails() -> None:
    world = World()

    async def fail(*_: Any) -> None:
        raise RuntimeError("failed")

    server: Any = SimpleNamespace(state=SimpleNamespace(elora=world.manager.elora))
    client = TestClient(SessionGate(fail, server))
    with pytest.raises(RuntimeError):
        client.post(CHAT, headers={SESSION_HEADER: "s1", END_HEADER: "true"})
    assert world.closed == ["s1"]


def test_draining_server_serves_open_sessions_and_refuses_all_others() -> None:
    world = World(["open"])
    assert world.post(body={"session_id": "new"}).status_code == 200
    assert world.begin().draining
    body = {"session_id": "open", "messages": ["x" * 100]}
    answer = world.post(body=body)
    assert answer.status_code == 200 and answer.json() == body
    assert world.post(body={"session_params": {"id": "open"}}).status_code == 200
    assert world.post(body={}, **{SESSION_HEADER: "open"}).status_code == 200
    for refused in (
        world.post(body={"session_id": "new"}),
        world.post(body={"session_id": ["open"]}),
        world.post(body={"session_id": 1}),
        world.post(body={}),
        world.post(body=[{"session_id": "open"}]),
        world.client.post(CHAT, content=b"{"),
        world.client.post(CHAT, content=b"\xff"),
        world.post(body={"session_id": "new"}, **{SESSION_HEADER: "open"}),
        world.post("/generate", body={"text": "hello"}),
        world.client.get("/open_session"),
    ):
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert "draining" in refused.json()["message"] and refused.json()["code"] == 503
    asyncio.run(world.drain.end())
    assert world.post(body={"session_id": "new"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "body", "key", "status"),
    [
        ("", {"user": "open"}, "open", 503),
        ("user", {"user": "open"}, "new", 200),
        ("routing-key", {}, "open", 200),
        ("routing-key,user", {"user": "open"}, "new", 503),
    ],
)
def test_draining_server_knows_sessions_by_the_configured_fields(
    fields: str, body: Any, key: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "_active", EloraConfig(enabled=True, session_from=fields))
    world = World(["open"])
    world.begin()
    assert world.post(body=body, x_smg_routing_key=key).status_code == status


def test_drain_refuses_websockets() -> None:
    world = World()
    with world.client.websocket_connect("/v1/realtime"):
        pass
    world.begin()
    with (
        pytest.raises(WebSocketDisconnect) as refused,
        world.client.websocket_connect("/v1/realtime"),
    ):
        pass
    assert refused.value.code == 1013


def test_drain_counts_requests_and_sessions_that_are_left() -> None:
    world = World(["idle", "open", "gone"])
    running = {"r1": "running", "r2": None, "HEALTH_CHECK_1": None}
    world.manager.rid_to_state = {
        rid: SimpleNamespace(obj=SimpleNamespace(session_id=session))
        for rid, session in running.items()
    }
    assert world.status().num_requests == 2 and world.status().open_sessions == 0
    begun = world.begin()
    assert begun.num_requests == 2 and begun.open_sessions == 4
    world.manager.rid_to_state = {}
    world.sessions.remove("gone")
    left = world.status()
    assert left.num_requests == 0 and left.open_sessions == 2  # nothing of "running" was cached
    assert world.post(body={"session_id": "running"}).status_code == 200
    asyncio.run(world.drain.end())
    world.begin(session_idle_s=0.0)
    assert world.status().open_sessions == 0
    assert world.post(body={"session_id": "idle"}).status_code == 200  # its KV is still here


def test_second_drain_order_keeps_the_sessions_of_the_first() -> None:
    world = World(["open"])
    world.begin()
    world.sessions.append("new")
    world.begin()
    assert world.post(body={"session_id": "new"}).status_code == 503


def test_server_is_unready_for_a_while_before_it_refuses_new_sessions() -> None:
    async def work() -> None:
        begun = await world.drain.begin(DrainOptions(refuse_after_s=0.1))
        assert begun.draining and not begun.refusing
        world.sessions.append("late")
        while not world.drain.is_refusing:
            assert world.drain.admits("new")
            await asyncio.sleep(0.01)

    world = World()
    asyncio.run(work())
    assert world.drain.admits("late") and not world.drain.admits("new")


def test_drain_that_ends_before_it_refuses_never_refuses() -> None:
    async def work() -> None:
        await world.drain.begin(DrainOptions(refuse_after_s=0.05))
        assert not (await world.drain.end()).draining
        await world.drain.begin(DrainOptions(refuse_after_s=10.0))
        await asyncio.sleep(0.2)
        assert world.drain.is_draining and not world.drain.is_refusing

    world = World()
    asyncio.run(work())


def test_second_drain_order_tries_again_if_the_scheduler_did_not_answer_the_first() -> None:
    world = World(["open"])
    ask = world._ask

    async def fail(request: Any) -> Any:
        raise RuntimeError("no answer")

    world.manager.elora.ask = fail
    with pytest.raises(RuntimeError, match="no answer"):
        world.begin()
    assert world.drain.is_draining and not world.drain.is_refusing
    world.manager.elora.ask = ask
    assert world.begin().refusing


def test_server_is_not_ready_while_it_drains() -> None:
    world = World()
    yes: Callable[[Any], bool] = lambda _: True  # noqa: E731
    assert is_ready(yes, world.manager)
    world.begin()
    assert not is_ready(yes, world.manager)
    assert is_ready(yes, SimpleNamespace())  # type: ignore[arg-type]  # without adapters


def test_drain_refuses_every_endpoint_that_computes_on_the_model() -> None:
    """A new endpoint of SGLang must be in one of the two lists."""
    computing = {
        "/api/chat",
        "/api/generate",
        "/classify",
        "/encode",
        "/generate",
        "/inference/v1/generate",
        "/invocations",
        "/rerank",
        "/score",
        "/v1/audio/transcriptions",
        "/v1/chat/completions",
        "/v1/classify",
        "/v1/completions",
        "/v1/decisions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/rerank",
        "/v1/responses",
        "/v1/score",
        "/v1/systemone",
        "/vertex_generate",
    }
    of_users = {
        path
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method in ("POST", "PUT")
        and (path := getattr(route, "path", ""))
        and _get_auth_level_from_app_and_scope(
            app, {"type": "http", "method": method, "path": path, "headers": []}
        )
        == AuthLevel.NORMAL
    }
    left = of_users - STARTS_NOTHING - {"/open_session"} - computing
    assert {path for path in left if not path.startswith(RESPONSES)} == set()
    assert of_users >= STARTS_NOTHING, STARTS_NOTHING - of_users
