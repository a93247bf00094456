"""Endpoints ``/elora/*`` on SGLang's HTTP server, and adapters' tiers in ``/v1/models``."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, ORJSONResponse
from pydantic import BaseModel, Field, model_validator
from sglang.srt.utils.auth import AuthLevel, auth_level
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from sglang_elora.control import AdapterState, PoolState
from sglang_elora.control.page_policy import content_policy
from sglang_elora.srt.messages import AdapterOrderAnswer
from sglang_elora.srt.orders import OrderRefused
from sglang_elora.srt.tokenizer.drain import (
    REFUSE_AFTER_S,
    SESSION_IDLE_S,
    DrainOptions,
    DrainStatus,
)
from sglang_elora.srt.tokenizer.http_guard import PAGE, HttpGuard
from sglang_elora.srt.tokenizer.request_checks import MAX_CHARS
from sglang_elora.srt.tokenizer.session_gate import SessionGate
from sglang_elora.srt.tokenizer.tokenizer_control import (
    GLANCE_S,
    NoAnswer,
    NotLoaded,
    TokenizerControl,
)

logger = logging.getLogger(__name__)

_MODELS = "/v1/models"
_SERVER_INFO = ("/server_info", "/get_server_info")
_SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
_HIDDEN = "<hidden>"
_PAGE_HEADERS = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_CHANGES_FOR_OTHERS = ("/load_lora_adapter_from_tensors",)
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def _for_admins(endpoint: _Endpoint) -> _Endpoint:
    """Protect an endpoint by the same key as SGLang's own control endpoints."""
    auth_level(AuthLevel.ADMIN_OPTIONAL)(endpoint)
    return endpoint


_Name = Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]
_Names = Annotated[list[_Name], Field(min_length=1, max_length=1000)]


class Prefetch(BaseModel):
    """Adapters by served name, and sessions by the ``session_id`` of their requests."""

    lora_name: _Name | _Names | None = None
    session_id: _Name | _Names | None = None
    tier: Literal["device", "host"] = Field(
        default="device",
        description="host: only read the adapters' files, the first one first, when idle.",
    )

    @model_validator(mode="after")
    def _names_something(self) -> Prefetch:
        if not (self.lora_name or self.session_id):
            raise ValueError("lora_name or session_id is missing")
        return self


class AdapterName(BaseModel):
    """An adapter by served name."""

    lora_name: _Name


class Pin(AdapterName):
    """An adapter, and the duration of its pin."""

    lease_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Seconds; without it until unpinned."
    )


def _add_control(app: FastAPI, control: TokenizerControl) -> None:
    # NOTE: on the app itself, not on a router. SGLang looks up an endpoint's access level among the
    # app's own routes, and treats those of an included router as open to all.
    elora: dict[str, Any] = {"tags": ["elora"], "response_class": ORJSONResponse}

    @app.get("/elora/state", **elora)
    @_for_admins
    async def state(lora_name: str | None = None) -> ORJSONResponse:
        """State of each adapter (tier, slots, KV) and of the pool, and counts since the start. With
        ``lora_name``, the state of that adapter only."""
        mirror = await control.refresh()
        loaded = control.loaded()
        if lora_name is not None:
            control.id_of(lora_name)
            loaded = {lora_name: loaded[lora_name]}
        report = await control.report()
        rows = [
            {
                "lora_name": name,
                "lora_path": ref.lora_path,
                **_row(mirror.adapters[ref.lora_id]),
                "lease_s": report.leases.get(ref.lora_id),
                "num_requests": report.uses.get(ref.lora_id, 0),
            }
            for name, ref in loaded.items()
            if ref.lora_id in mirror.adapters
        ]
        pool = _pool(mirror.pool, control.names())
        return ORJSONResponse({"adapters": rows, "pool": pool, "hints": report.hints})

    page = resources.files("sglang_elora.control").joinpath("page.html").read_text()
    headers = {**_PAGE_HEADERS, "Content-Security-Policy": content_policy(page)}

    @app.get(PAGE, tags=["elora"], response_class=HTMLResponse)
    async def ui() -> HTMLResponse:
        """A page with a live view of the state. It asks for the admin key if one is needed."""
        return HTMLResponse(page, headers=headers)

    @app.post("/elora/prefetch", **elora)
    @_for_admins
    async def prefetch(body: Prefetch) -> ORJSONResponse:
        """Load adapters to the device, after the adapters of all queued requests; with ``tier:
        host``, read their files into host memory, if they were never read. For sessions, load
        their KV from the host to the device once their adapter is there."""
        names, sessions = _listed(body.lora_name), _listed(body.session_id)
        adapter_ids = [control.id_of(name) for name in names]
        do = "prefetch" if body.tier == "device" else "read"
        if do == "read":  # each becomes the next one
            names, adapter_ids = names[::-1], adapter_ids[::-1]
        answers = await asyncio.gather(
            *(control.order(do, adapter_id) for adapter_id in adapter_ids),
            *(control.order("prefetch_session", session) for session in sessions),
        )
        tiers = {name: answer.tier for name, answer in zip(names, answers, strict=False)}
        errors = [answer.error for answer in answers if answer.error]
        if errors:
            return _failure(errors[0], tiers=tiers)
        return ORJSONResponse({"success": True, "error_message": "", "tiers": tiers})

    @app.post("/elora/pin", **elora)
    @_for_admins
    async def pin(body: Pin) -> ORJSONResponse:
        """Load an adapter to the device and pin it."""
        return _outcome(await control.pin(control.id_of(body.lora_name), body.lease_s))

    @app.post("/elora/unpin", **elora)
    @_for_admins
    async def unpin(body: AdapterName) -> ORJSONResponse:
        """Unpin an adapter, so that it may be evicted; also one that was loaded as pinned."""
        return _outcome(await control.unpin(control.id_of(body.lora_name)))

    @app.post("/elora/evict", **elora)
    @_for_admins
    async def evict(body: AdapterName) -> ORJSONResponse:
        """Evict an adapter and its KV from the device within the next iterations. KV without a host
        copy is dropped."""
        return _outcome(await control.order("evict", control.id_of(body.lora_name)))


class DrainBody(BaseModel):
    """How to drain."""

    refuse_after_s: float = Field(
        default=REFUSE_AFTER_S,
        ge=0,
        le=3600,
        description="Seconds from the order until new sessions are refused.",
    )
    session_idle_s: float = Field(
        default=SESSION_IDLE_S,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without a request after which a session is not waited for.",
    )


def _add_drain(app: FastAPI, control: TokenizerControl) -> None:
    elora: dict[str, Any] = {"tags": ["elora"], "response_class": ORJSONResponse}

    @app.post("/elora/drain", **elora)
    @_for_admins
    async def drain(body: DrainBody | None = None) -> ORJSONResponse:
        """Refuse new sessions with HTTP 503, and serve open ones to their end. ``GET /ready``
        answers 503 at once."""
        options = DrainOptions(**(body or DrainBody()).model_dump())
        return _drained(await control.drain.begin(options))

    @app.get("/elora/drain", **elora)
    @_for_admins
    async def drain_status() -> ORJSONResponse:
        """The requests and sessions that a drain still waits for."""
        return _drained(await control.drain.status())

    @app.delete("/elora/drain", **elora)
    @_for_admins
    async def end_drain() -> ORJSONResponse:
        """Serve all sessions again."""
        return _drained(await control.drain.end())


def _drained(status: DrainStatus) -> ORJSONResponse:
    return ORJSONResponse(msgspec.structs.asdict(status))


def _close_to_users(app: FastAPI) -> None:
    """Restrict to admins those endpoints of SGLang that affect other users but are open to every
    key."""
    for route in app.routes:
        if getattr(route, "path", None) in _CHANGES_FOR_OTHERS:
            _for_admins(route.endpoint)  # type: ignore[attr-defined]


def _hide_secrets(app: FastAPI) -> None:
    """Hide the server's keys in SGLang's description of the server, which any user may request."""
    for path in _SERVER_INFO:
        app.add_api_route(path, _without_secrets(_taken(app, path)), methods=["GET"])


def _without_secrets(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def without_secrets() -> Any:
        info = await endpoint()
        secrets = [secret for field in _SECRETS if (secret := info.get(field))]
        return _hidden(info, secrets)

    return without_secrets


def _hidden(value: Any, secrets: Sequence[str]) -> Any:
    """The value with all secrets replaced, which occur in fields and in command lines."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _HIDDEN)
        return value
    if isinstance(value, dict):
        return {key: _hidden(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner, secrets) for inner in value]
    return value


def guard(app: FastAPI) -> None:
    """Add checks of access and answers to errors. Call once, before the app has been started."""
    app.add_middleware(HttpGuard, routes=app)
    app.user_middleware.append(Middleware(SessionGate, server=app))  # the innermost
    _close_to_users(app)
    _hide_secrets(app)
    for refusal in (NotLoaded, OrderRefused):
        app.add_exception_handler(refusal, _refused)
    for raised in (ValueError, TypeError, LookupError):
        app.add_exception_handler(raised, _misfit)
    app.add_exception_handler(NoAnswer, _no_answer)
    app.state.elora_guarded = True


def add_endpoints(app: FastAPI, control: TokenizerControl) -> None:
    if not getattr(app.state, "elora_guarded", False):
        guard(app)
    app.state.elora = control
    _add_control(app, control)
    _add_drain(app, control)
    _add_tiers(app, control)
    if control.serves_metrics:
        _add_metrics(app, control)


def _add_metrics(app: FastAPI, control: TokenizerControl) -> None:
    """Replace SGLang's ``/metrics`` by one with the same metrics and ELORA's."""
    # NOTE: imported late: on import it reads the folder that SGLang sets at its start.
    from prometheus_client import CollectorRegistry, make_asgi_app, multiprocess

    from sglang_elora.control.metrics import StateCollector

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(
        StateCollector(control.mirror, control.names, lambda: control.hints, control.model_name)
    )
    scrape = make_asgi_app(registry=registry)

    async def fresh(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.gather(control.glance(), control.report(GLANCE_S))
        await scrape(scope, receive, send)

    route = Mount("/metrics", fresh)
    route.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as SGLang's: no redirect
    app.routes.append(route)


def _taken(app: FastAPI, path: str) -> Callable[..., Any]:
    """Remove SGLang's route for a path, to be replaced, and return its endpoint."""
    route: Any = next(route for route in app.routes if getattr(route, "path", None) == path)
    app.router.routes.remove(route)
    endpoint: Callable[..., Any] = route.endpoint
    return endpoint


def _add_tiers(app: FastAPI, control: TokenizerControl) -> None:
    original, original_of_one = _taken(app, _MODELS), _taken(app, f"{_MODELS}/{{model:path}}")

    @app.get(_MODELS, response_class=ORJSONResponse)
    async def available_models() -> ORJSONResponse:
        """Show available models. OpenAI-compatible endpoint. Adapters have a field ``tier``."""
        models = (await original()).model_dump()
        mirror, loaded = await control.glance(), control.loaded()
        for card in models["data"]:
            ref = loaded.get(card["id"])
            if card.get("parent") and ref is not None and ref.lora_id in mirror.adapters:
                card["tier"] = mirror.adapters[ref.lora_id].tier
        return ORJSONResponse(models)

    @app.get(f"{_MODELS}/{{model:path}}", response_class=ORJSONResponse)
    async def retrieve_model(model: str) -> Any:
        """Retrieve a model or an adapter by the id that it is listed under."""
        listed: dict[str, Any] = orjson.loads((await available_models()).body)
        cards = [card for card in listed["data"] if card["id"] == model]
        return ORJSONResponse(cards[0]) if cards else await original_of_one(model)


def _listed(names: str | list[str] | None) -> list[str]:
    return (
        [] if names is None else list(dict.fromkeys([names] if isinstance(names, str) else names))
    )


def _row(state: AdapterState) -> dict[str, Any]:
    row = msgspec.structs.asdict(state)
    last_used_s = row.pop("last_used_s")
    row["lora_id"] = row.pop("id")
    row["idle_s"] = None if last_used_s is None else time.monotonic() - last_used_s
    return row


def _pool(pool: PoolState | None, names: Mapping[str, str]) -> dict[str, Any]:
    assert pool is not None, "the state was asked for"
    found = {**msgspec.structs.asdict(pool), "uses": pool.uses}
    for which in ("waiting", "running"):
        found[which] = [names[adapter_id] for adapter_id in found[which] if adapter_id in names]
    found["load_s"] = {"at_most": dict(pool.load_s.cumulative()), "sum": pool.load_s.sum_s}
    return found


def _outcome(answer: AdapterOrderAnswer) -> ORJSONResponse:
    if answer.error:
        return _failure(answer.error, tier=answer.tier)
    return ORJSONResponse({"success": True, "error_message": "", "tier": answer.tier})


def _failure(text: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, **more: Any) -> ORJSONResponse:
    body = {"success": False, "error_message": text, **more}
    return ORJSONResponse(body, status_code=status)


def _refused(request: Request, error: Exception) -> ORJSONResponse:
    return _failure(str(error))


def _misfit(request: Request, error: Exception) -> ORJSONResponse:
    """Answer HTTP 400 for errors that SGLang's endpoints raise on invalid values."""
    logger.warning("%s %s failed", request.method, request.url.path, exc_info=error)
    return _failure(f"the request cannot be served: {type(error).__name__}: {error}")


def _no_answer(request: Request, error: Exception) -> ORJSONResponse:
    return _failure(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
