"""SGLang's frontend language with an adapter per call. Importing this module turns it on.

    import sglang as sgl
    import sglang_elora.lang as elora

    @elora.traced
    @sgl.function
    def answer(s, question):
        s += question + sgl.gen("query", lora_path="sql")
        s += sgl.gen("summary", lora_path="writer")

    answer.run(question="...", backend=sgl.RuntimeEndpoint("http://127.0.0.1:30000"))

The functions here control which adapters are announced to an ELORA server before their requests
arrive. The language itself works with any SGLang server that serves adapters.
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
    """Announce that this state's program will soon call these adapters. For calls that only the
    program can foresee, such as those of a branch not yet decided. Never raises, never blocks."""
    executor = state.stream_executor
    announcer = announcing.announcer_of(getattr(executor, "backend", None))
    if announcer is not None:
        announcer.announce(adapters)


def traced(program: _Program) -> _Program:
    """The same ``sgl.function``, with a trace before each run. The trace finds the adapters of its
    calls, up to the first place where the program reads an answer, and announces them.

    A trace executes the program's body once more, without the model. So use this only for programs
    that do nothing but append to their state: no files, no tools, no other program.
    """
    return tracing.mark(program)


def prefetch(backend: Any, enabled: bool = True, *, admin_key: str | None = None) -> None:
    """Turn announcements to the server of a ``RuntimeEndpoint`` or ``Runtime`` on or off.

    Args:
        admin_key: The key to announce with, if it is not the endpoint's own.

    Raises:
        ValueError: The backend is of another type.
    """
    announcer = announcing.announcer_of(backend)
    if announcer is None:
        raise ValueError(f"{backend!r} must be a RuntimeEndpoint or a Runtime")
    announcer.enabled = enabled
    if admin_key is not None:
        announcing.set_admin_key(announcer, admin_key)
