"""A gateway in front of one server: each tenant has a key, and the key decides the adapter.

Run it by ``python examples/tenant_gateway.py``: the gateway and three tenants who use it, one of
them with a wrong key. Nothing that a tenant sends names an adapter or a session of another.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx
import uvicorn
from demo_server import demo_server, parser
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from openai import AuthenticationError, OpenAI

MODEL = "demo"
PASSED = (  # on to the server; what else a request has is left out
    *("messages", "temperature", "top_p", "max_tokens", "stop", "seed"),
    *("stream", "stream_options"),
)


def gateway(server_url: str, adapter_of_key: Mapping[str, str]) -> FastAPI:
    """``POST /v1/chat/completions`` as the OpenAI API has it, plus ``session_id``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)  # the server's is 5 s
        options = {"base_url": server_url, "timeout": None, "limits": limits}
        async with httpx.AsyncClient(trust_env=False, **options) as http:
            app.state.http = http
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        adapter = adapter_of_key.get(key)
        if adapter is None:
            raise HTTPException(401, "unknown key")
        asked = await request.json()
        body = {name: asked[name] for name in PASSED if name in asked}
        body |= {"model": MODEL, "lora_path": adapter}
        if session := asked.get("session_id"):
            body["session_id"] = hashlib.sha256(f"{key}/{session}".encode()).hexdigest()
        sent = app.state.http.build_request("POST", "/v1/chat/completions", json=body)
        answer = await app.state.http.send(sent, stream=True)

        async def passed() -> AsyncIterator[bytes]:  # also when the tenant hangs up
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()

        kind = answer.headers.get("content-type")
        return StreamingResponse(passed(), answer.status_code, media_type=kind)

    return app


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def main() -> None:
    with demo_server(parser(__doc__).parse_args()) as (server_url, names):
        keys = {secrets.token_hex(8): name for name in names[:2]}
        with running(gateway(server_url, keys)) as url:
            for key in (*keys, "stolen"):
                client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
                who = keys.get(key, "a wrong key")
                messages: list[Any] = []
                # The server's own fields: of these the gateway passes the session on, renamed.
                more: dict[str, Any] = {"session_id": "mine", "lora_path": names[2]}
                try:
                    for line in ("Where is the harbour?", "And when does the train leave?"):
                        messages.append({"role": "user", "content": line})
                        answer = client.chat.completions.create(
                            model="whatever",
                            messages=messages,
                            temperature=0,
                            max_tokens=32,
                            extra_body=more,
                        )
                        said, usage = answer.choices[0].message.content, answer.usage
                        messages.append({"role": "assistant", "content": said})
                        details = usage.prompt_tokens_details
                        cached = details.cached_tokens if details else 0
                        print(f"{who}: {said!r} ({cached} of {usage.prompt_tokens} cached)")
                except AuthenticationError as error:
                    print(f"{who}: {error.status_code} {error.body}")


if __name__ == "__main__":
    main()
