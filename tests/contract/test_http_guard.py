"""Which callers may send orders that SGLang's key check does not cover."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from sglang_elora.control.page_policy import content_policy

KEY, HOST = "let-me-in", "http://127.0.0.1:30000"
FOREIGN = ("http://elsewhere.example", "null", f"{HOST}.elsewhere.example", "https://127.0.0.1:1")
ORDERS = ("/load_lora_adapter", "/flush_cache", "/abort_request", "/release_memory_occupation")

Guarded = Callable[..., Any]  # starlette's TestClient


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that the guard protects: accepts every request."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """``guarded(api_key=..., admin_api_key=...)``: a client of a server with these keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.entrypoints.http_server import app
        from starlette.testclient import TestClient

        from sglang_elora.srt.tokenizer import http_guard

    def make(api_key: str | None = None, admin_api_key: str | None = None) -> Any:
        keys: Any = SimpleNamespace(api_key=api_key, admin_api_key=admin_api_key)
        monkeypatch.setattr(http_guard, "get_serving", lambda: keys)
        return TestClient(http_guard.HttpGuard(answer, routes=app), base_url=HOST)

    return make


@pytest.mark.parametrize("origin", FOREIGN)
def test_cross_origin_post_orders_are_refused_without_a_key(origin: str, guarded: Guarded) -> None:
    client = guarded()
    for path in ORDERS:
        got = client.post(path, headers={"Origin": origin})
        assert got.status_code == 403 and "--admin-api-key" in got.text, path


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_cross_site_get_orders_are_refused_without_a_key(site: str, guarded: Guarded) -> None:
    """A page's image is requested by GET without an Origin; SGLang would execute that order."""
    for path in ("/flush_cache", "/release_memory_occupation"):
        assert guarded().get(path, headers={"Sec-Fetch-Site": site}).status_code == 403, path
    assert guarded().get("/flush_cache", headers={"Sec-Fetch-Site": "none"}).status_code == 200


def test_same_origin_or_keyed_orders_are_allowed(guarded: Guarded) -> None:
    """Allowed: this server's pages, non-browser clients, and key owners, whom SGLang checks."""
    for path in ORDERS:
        assert guarded().post(path).status_code == 200
        assert guarded().post(path, headers={"Origin": HOST}).status_code == 200
        for keys in ({"api_key": KEY}, {"admin_api_key": KEY}):
            got = guarded(**keys).post(path, headers={"Origin": FOREIGN[0]})
            assert got.status_code == 200


def test_generate_requests_are_allowed_from_any_origin(guarded: Guarded) -> None:
    for path in ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert guarded().post(path, headers={"Origin": FOREIGN[0]}).status_code == 200
    assert guarded().get("/v1/models", headers={"Origin": FOREIGN[0]}).status_code == 200


@pytest.mark.parametrize(
    ("given", "enters"),
    [
        (None, False),
        ("Bearer wrong", False),
        (b"Bearer wr\xf6ng", False),
        (f"Basic {KEY}", False),
        (f"Bearer {KEY}", True),
    ],
)
def test_websocket_requires_the_api_key(
    given: str | bytes | None, enters: bool, guarded: Guarded
) -> None:
    headers = {} if given is None else {"Authorization": given}
    client = guarded(api_key=KEY)
    if enters:
        with client.websocket_connect("/v1/realtime", headers=headers):
            return
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/v1/realtime", headers=headers),
    ):
        pass


def test_websocket_is_open_when_no_api_key_is_set(guarded: Guarded) -> None:
    with guarded(admin_api_key=KEY).websocket_connect("/v1/realtime"):
        pass


def test_ui_page_csp_allows_only_its_own_script_and_no_frame() -> None:
    policy = content_policy("<style>a</style><script>b</script>")
    assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
    assert "'unsafe" not in policy and "connect-src 'self'" in policy
    assert policy != content_policy("<style>a</style><script>c</script>")
