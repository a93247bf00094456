"""The HTTP app of a tokenizer worker (``--tokenizer-worker-num``): SGLang's, with plugins loaded.

SGLang starts these workers by the name of their app (``SGLANG_HTTP_SERVER_APP_PATH``), without
plugins.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sglang.srt.plugins import load_plugins

load_plugins()  # before the app's module binds names of SGLang

from sglang.srt.entrypoints.http_server import app, get_global_state  # noqa: E402
from sglang.srt.utils import configure_logger  # noqa: E402

from sglang_elora.srt.tokenizer.endpoints import guard  # noqa: E402
from sglang_elora.srt.tokenizer.shared_table import use_loaded  # noqa: E402

__all__ = ["app"]

_lifespan = app.router.lifespan_context


@asynccontextmanager
async def _with_loaded_adapters(served: FastAPI) -> AsyncIterator[Any]:
    """SGLang's start of the worker, and then what was loaded before. It serves no request until
    then."""
    async with _lifespan(served) as state:
        manager = get_global_state().tokenizer_manager
        configure_logger(manager.server_args)  # as the other processes; SGLang leaves it out here
        if getattr(manager, "elora", None) is not None:
            await use_loaded(manager)
        yield state


guard(app)
app.router.lifespan_context = _with_loaded_adapters
