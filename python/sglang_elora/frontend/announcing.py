"""Hook bodies that announce the adapters of a frontend program's future calls."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglExprList, SglGen, SglSelect

from sglang_elora.control import Announcer
from sglang_elora.frontend import tracing

_TIMEOUT_S = 5.0
_LAST = "elora_last"  # attribute of an executor: the adapter of the call submitted last


def announcer_of(backend: Any) -> Announcer | None:
    """The announcer of a ``RuntimeEndpoint`` or of a ``Runtime``'s endpoint; None for others."""
    endpoint = getattr(backend, "endpoint", backend)
    if not isinstance(endpoint, RuntimeEndpoint):
        return None
    found = vars(endpoint).get("elora")
    if found is None:  # concurrent threads all get the announcer of the first
        found = vars(endpoint).setdefault("elora", Announcer(_Post(endpoint)))
    assert isinstance(found, Announcer)
    return found


def set_admin_key(announcer: Announcer, key: str) -> None:
    post = announcer._post
    assert isinstance(post, _Post)
    post.key = key


def announce_queued(self: StreamExecutor, expr: Any) -> None:
    """Hook before ``StreamExecutor.submit``: announces a call that must wait for an earlier call
    with another adapter. The earlier call's adapter is announced first, because its request may
    arrive after this hint but its adapter is needed sooner. A call that can run immediately is not
    announced: its request serves as its own hint."""
    names = list(_adapters(expr, self.lora_path))
    if not names or not self.use_thread:
        return
    before = [vars(self).get(_LAST), *names]
    waits = any(not event.is_set() for event in list(self.variable_event.values()))
    ahead = range(0 if waits else 1, len(names))
    setattr(self, _LAST, names[-1])
    announcer = announcer_of(self.backend)
    if announcer is not None:
        pairs = ((before[i], names[i]) for i in ahead if names[i] != before[i])
        announcer.announce(name for pair in pairs for name in pair)


def announce_branches(
    self: StreamExecutor, size: int = 1, position_ids_offset: Any = None, lora_path: Any = None
) -> None:
    """Hook before ``StreamExecutor.fork``, which waits for queued calls: announces the branches'
    adapters."""
    if lora_path is None:
        return
    announcer = announcer_of(self.backend)
    if announcer is not None:
        announcer.announce([lora_path] if isinstance(lora_path, str) else lora_path)


def announce_traced(
    program: Any, backend: Any, func_args: Any, func_kwargs: Any, *more: Any, **rest: Any
) -> None:
    """Hook before ``run_program``: announces all adapters of a traceable program, in order of use.
    Includes the first one: its request may arrive after this hint, its adapter is needed first."""
    tracing.refuse_inside()
    if not tracing.is_traced(program):
        return
    announcer = announcer_of(backend)
    if announcer is not None and announcer.enabled:
        names = tracing.adapters(program, backend, func_args, func_kwargs)
        announcer.announce(dict.fromkeys(names))


class _Post:
    """``POST /elora/prefetch`` to an endpoint's server, with its own key or the admin key."""

    def __init__(self, endpoint: RuntimeEndpoint) -> None:
        self._url = f"{endpoint.base_url}/elora/prefetch"
        self.key: str | None = endpoint.api_key
        verify = endpoint.verify
        self._ssl = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else None

    def __call__(self, names: Sequence[str]) -> int:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        body = json.dumps({"lora_name": list(names)}).encode()
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._ssl) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer from {self._url}: {error!r}") from error


def _adapters(expr: Any, default: str | None) -> Iterator[str | None]:
    """The adapter of each call in an appended expression, in order."""
    if isinstance(expr, SglExprList):
        for part in expr.expr_list:
            yield from _adapters(part, default)
    elif isinstance(expr, (SglGen, SglSelect)):
        named: str | None = getattr(expr, "lora_path", None)
        yield default if named is None else named
