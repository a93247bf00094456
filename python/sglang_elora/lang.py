"""SGLang's frontend language with an adapter per call. Importing this module turns it on.

    import sglang as sgl
    import sglang_elora.lang as elora

    @elora.traced
    @sgl.function
    def answer(s, question):
        s += question + sgl.gen("query", lora_path="sql")
        s += sgl.gen("summary", lora_path="writer")

    answer.run(question="...", backend=sgl.RuntimeEndpoint("http://127.0.0.1:30000"))

The functions here are about what is announced to an ELORA server before it is asked for. The
language itself works with any server of SGLang's that serves adapters.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.frontend.install import turn_on  # noqa: E402

turn_on()

from sglang_elora.frontend import announcing, tracing  # noqa: E402

__all__ = ["hint", "prefetch", "traced"]

_Program = TypeVar("_Program")


def hint(state: Any, *adapters: str) -> None:
    """Announce that the program of this state will soon call these adapters: for what only it can
    know, as the adapter of a branch that is not decided yet. Never fails, never waits."""
    executor = state.stream_executor
    announcer = announcing.announcer_of(getattr(executor, "backend", None))
    if announcer is not None:
        announcer.announce(adapters)


def traced(program: _Program) -> _Program:
    """Let each run of an ``sgl.function`` begin with a trace of it, which finds the adapters of its
    calls up to where it looks at an answer, and announces them.

    For a trace the program's body is executed once more, without the model. So this is for programs
    that do nothing but append to their state: no files, no tools, no other program.
    """
    return tracing.mark(program)


def prefetch(backend: Any, enabled: bool = True, *, admin_key: str | None = None) -> None:
    """Whether adapters are announced to the server of a ``RuntimeEndpoint`` or ``Runtime``, and
    under which key where that is not the endpoint's own.

    Raises:
        ValueError: It is another backend.
    """
    announcer = announcing.announcer_of(backend)
    if announcer is None:
        raise ValueError(f"{backend!r} must be a RuntimeEndpoint or a Runtime")
    announcer.enabled = enabled
    if admin_key is not None:
        announcing.set_admin_key(announcer, admin_key)
