"""A Ray Serve application whose replicas each own one SGLang server with ELORA.

client -> Serve's HTTP proxy -> Front -> (Serve's router: ``routing.py``) -> Engine -> server
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from routing import QUEUE, ROUTINGS
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.server import ServerProcess

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/generate", "/health")
TO_ALL = ("/close_session",)  # a session may be on any replica
NUM_ATTEMPTS = 5
FIRST_PAUSE_S = 0.2  # before the second attempt; it doubles each time
SESSION_HEADERS = ("x-request-id-session", "x-smg-routing-key")
_NOT_FORWARDED = ("host", "content-length", "connection", "transfer-encoding", "accept-encoding")
_GUARDED = (sys.executable, str(Path(__file__).with_name("guard.py")))
"""A server that ends with the replica, however that ends (``guard.py``)."""

logger = logging.getLogger("ray.serve")


@serve.deployment
class Engine:
    """A replica: starts its server, passes requests on, and lives as long as the server.

    Args:
        flags: Command line of the server, without host and port.
        folder: Folder of the servers' logs.
        release: Any text; another one restarts all replicas one after the other.
    """

    def __init__(self, flags: Sequence[str], folder: str, release: str = "") -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        log_path = Path(folder) / f"server-{self._name}.log"
        self._server = ServerProcess(flags, log_path=log_path, program=_GUARDED, stop_timeout_s=10)
        self._server.start()
        guard = psutil.Process(self._server.pid).children()[0]
        self._process = guard.children()[0]
        self._ending = False
        self._http = httpx.AsyncClient(
            base_url=self._server.url, timeout=None, trust_env=False, limits=LIMITS
        )
        threading.Thread(target=self._end_with_server, daemon=True).start()

    def _end_with_server(self) -> None:
        """A replica without a server would refuse at once, look idle, and get every request."""
        self._process.wait()
        if not self._ending:
            logger.error("the server of %s has ended", self._name)
            os._exit(1)  # the guard ends what the server has left

    @serve.multiplexed(max_num_models_per_replica=-1)
    async def adapter(self, name: str) -> str:
        """Called once for an adapter: Serve's router then prefers this replica for it.

        The server starts to load the adapter; whether it stays there is for its cache to decide.
        """
        (await self._http.post("/elora/prefetch", json={"lora_name": name})).raise_for_status()
        return name

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Any]:
        """The status and the content type first, then the bytes of the server's answer."""
        if name := serve.get_multiplexed_model_id():
            with suppress(httpx.HTTPStatusError):  # no such adapter: the server's answer says so
                await self.adapter(name)
        async with self._http.stream(method, path, content=body, headers=headers) as answer:
            yield answer.status_code, answer.headers.get("content-type", "")
            async for chunk in answer.aiter_raw():
                yield chunk

    async def order(self, path: str, body: bytes) -> tuple[int, bytes]:
        answer = await self._http.post(path, content=body)
        return answer.status_code, answer.content

    async def describe(self) -> dict[str, Any]:
        return {"replica": self._name, "url": self._server.url, "pid": self._process.pid}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        state = (await self._http.get("/elora/state")).json()
        return {QUEUE: state["pool"]["num_waiting"]}

    async def check_health(self) -> None:
        (await self._http.get("/health")).raise_for_status()

    async def __del__(self) -> None:
        """Serve calls this when the replica has answered all it was sent."""
        self._ending = True
        await self._http.aclose()
        await asyncio.to_thread(self._server.stop)


@serve.deployment(
    max_ongoing_requests=1000, max_surge_percent=100, ray_actor_options={"num_cpus": 0}
)
class Front:
    """The API: names a request's adapter and session to Serve's router, and passes answers on.

    A request whose replica ends before the first byte of its answer is sent to another one. That is
    safe: a request changes nothing but caches.
    """

    def __init__(self, engines: DeploymentHandle, model: str, by_adapter: bool) -> None:
        self._engines, self._model, self._by_adapter = engines, model, by_adapter
        self._counts = Counter(repeated=0, broken=0, unavailable=0)

    async def counts(self) -> dict[str, int]:
        """Requests ``repeated`` on another replica; answers that were ``broken`` off; requests for
        which no replica was found (``unavailable``)."""
        return dict(self._counts)

    async def __call__(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        if path in TO_ALL:
            return await self._to_all(path, body)
        if path not in PATHS:
            return _error(404, f"{path}: this API has {', '.join((*PATHS, *TO_ALL))}")
        fields = _fields(body)
        engines = self._engines.options(
            method_name="answer",
            stream=True,
            multiplexed_model_id=adapter_of(fields, self._model) if self._by_adapter else "",
            session_id=session_of(fields, request.headers),
        )
        headers = {k: v for k, v in request.headers.items() if k not in _NOT_FORWARDED}
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                self._counts["repeated"] += 1
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            chunks = engines.remote(request.method, path, headers, body)
            try:
                status, content_type = await anext(chunks)
                first = await anext(chunks, b"")
            except RayError as error:
                logger.warning("attempt %d at %s: %s", attempt + 1, path, type(error).__name__)
                continue
            whole = self._whole(first, chunks, "event-stream" in content_type)
            return StreamingResponse(whole, status, media_type=content_type)
        self._counts["unavailable"] += 1
        return _error(503, f"{NUM_ATTEMPTS} replicas ended before they answered")

    async def _whole(
        self, first: bytes, rest: AsyncIterator[bytes], is_events: bool
    ) -> AsyncIterator[bytes]:
        """The answer. One that a replica does not complete ends with an error, never as if it were
        whole."""
        yield first
        try:
            async for chunk in rest:
                yield chunk
        except RayError as error:
            self._counts["broken"] += 1
            logger.warning("an answer was broken off: %s", type(error).__name__)
            if not is_events:
                raise
            text = json.dumps(_error_body(502, "the replica ended while it answered"))
            yield f"data: {text}\n\n".encode()

    async def _to_all(self, path: str, body: bytes) -> Response:
        answers = await self._engines.broadcast("order", path, body).results_async()
        status, content = min(answers)  # success if one of them had it
        return Response(content, status, media_type="application/json")


def adapter_of(fields: Mapping[str, Any], model: str) -> str:
    """The adapter that a request names, empty for the base model."""
    named = fields.get("lora_path") or fields.get("model") or ""
    named = named[0] if isinstance(named, list) else named
    return "" if named == model else str(named).removeprefix(f"{model}:")


def session_of(fields: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The session that a request names in its body or by header, empty if none."""
    named = [fields.get("session_id"), *(headers.get(name) for name in SESSION_HEADERS)]
    return next((str(name) for name in named if name), "")


def _fields(body: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(body or b"{}")
    except ValueError:  # the server's answer says what is wrong with it
        return {}
    return fields if isinstance(fields, dict) else {}


def _error_body(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "InternalServerError", "code": status}}


def _error(status: int, message: str) -> Response:
    return JSONResponse(_error_body(status, message), status)


def application(
    flags: Sequence[str],
    folder: Path,
    *,
    model: str,
    routing: str = "adapter_session",
    num_replicas: int = 2,
    min_replicas: int | None = None,
    max_ongoing_requests: int = 32,
    max_surge_percent: int = 0,
    num_gpus: float = 0,
    release: str = "",
) -> serve.Application:
    """The application, for ``serve.run``.

    Args:
        flags: Of each replica's server, without host and port.
        folder: Folder of the servers' logs.
        model: ``--served-model-name`` of the servers.
        routing: A key of ``routing.ROUTINGS``.
        num_replicas: Replicas; with ``min_replicas`` the most there are.
        min_replicas: If given, Serve scales between this number and ``num_replicas``.
        max_ongoing_requests: Requests that a replica accepts; the router holds back the others.
        max_surge_percent: Replicas, in percent, that a rolling restart starts before it stops as
            many; 0 stops one first, and needs no memory for a further server.
        num_gpus: GPUs of a replica, which Ray assigns.
        release: Another value restarts all replicas, one after the other.
    """
    chosen = ROUTINGS[routing]
    scaled: dict[str, Any] = {"num_replicas": num_replicas}
    if min_replicas is not None:
        policy = AutoscalingPolicy(policy_function="routing.num_replicas_wanted")
        scaled = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=min_replicas,
                max_replicas=num_replicas,
                target_ongoing_requests=max_ongoing_requests / 2,
                look_back_period_s=11,
                upscale_delay_s=2,
                policy=policy,
            )
        }
    engines = Engine.options(
        **scaled,
        max_ongoing_requests=max_ongoing_requests,
        max_surge_percent=max_surge_percent,
        request_router_config=RequestRouterConfig(request_router_class=chosen.router),
        health_check_period_s=2,
        health_check_timeout_s=25,  # SGLang's /health takes up to 20 s to fail
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=300,  # for the longest answer
        ray_actor_options={"num_cpus": 0, "num_gpus": num_gpus},
    ).bind(list(flags), str(folder), release)
    return Front.bind(engines, model, chosen.by_adapter)
