"""Which adapters a program will ask for, found by going through it without a call of the model."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from sglang.lang.ir import SglExpr, SglFunction, SglGen, SglSelect, SglVariable
from sglang.lang.tracer import StopTracing, TracerProgramState
from typing_extensions import override

logger = logging.getLogger(__name__)

_MARK = "elora_traced"
_here = threading.local()
_Program = TypeVar("_Program", bound=SglFunction)


def mark(program: _Program) -> _Program:
    """Allow the program to be traced at each of its runs."""
    setattr(program, _MARK, True)
    return program


def is_traced(program: SglFunction) -> bool:
    return getattr(program, _MARK, False)


def refuse_inside() -> None:
    """Raises StopTracing if this thread is tracing: a program that runs another one in its body
    would have it run for nothing."""
    if getattr(_here, "tracing", False):
        raise StopTracing


def adapters(
    program: SglFunction, backend: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> list[str | None]:
    """The adapter of each call, in order, as far as it does not depend on what the model says.

    None and "" are the base model. The trace goes on where an answer is only put into the text. It
    ends where the program looks at one.
    """
    keywords = {**keywords, **program.bind_arguments}
    own = "lora_path" in inspect.signature(program.func).parameters
    default = None if own else keywords.pop("lora_path", None)
    state = _State(backend, {}, only_trace_prefix=False, lora_path=default)
    _as_ours(state, [])
    _here.tracing = True
    try:
        program.func(state, *arguments, **keywords)
    except StopTracing:
        pass
    except Exception as error:  # noqa: BLE001  # what it raises at its run, it raises there
        logger.debug("%s is traced in part: %r", program.func, error)
    finally:
        _here.tracing = False
    return state.calls


class _State(TracerProgramState):
    """SGLang's tracer, which notes calls of itself and of its forks, and stops at any look at an
    answer. Programs that are called in the body are not traced, so it opens no tracing scope."""

    calls: list[str | None]
    stream_executor: _Executor

    @override
    def fork(
        self, size: int = 1, position_ids_offset: list[int] | None = None, lora_path: Any = None
    ) -> Any:
        group = super().fork(size, position_ids_offset, lora_path)
        for state in group.states:
            _as_ours(state, self.calls)
        return group

    @override
    def get_var(self, name: str) -> Any:
        found = self.variables[name]
        if isinstance(found, list):  # of forks that have joined
            return [_Answer(variable.name, variable.source) for variable in found]
        return _Answer(found.name, found.source)

    @override
    def text_iter(self, var_name: str | None = None) -> NoReturn:
        raise StopTracing

    text_async_iter = get_meta_info = text_iter

    @override
    def _execute_gen(self, expr: SglGen) -> None:
        self._note(expr)
        super()._execute_gen(expr)

    @override
    def _execute_select(self, expr: SglSelect) -> None:
        self._note(expr)
        super()._execute_select(expr)

    def _execute_var_scope_begin(self, expr: SglExpr) -> None:
        """SGLang's tracer knows the end of a scope only, which makes the variable."""

    def _note(self, expr: SglGen | SglSelect) -> None:
        self.calls.append(self.lora_path if expr.lora_path is None else expr.lora_path)


class _Executor:
    """What ``ProgramState`` reaches for beside what the tracer overrides."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self.variables = state.variables

    def submit(self, expr: SglExpr) -> None:
        self._state._execute(expr)

    def set_var(self, name: str, value: Any) -> None:
        raise StopTracing

    def sync(self) -> None:
        """All that is submitted has been executed."""

    def end(self) -> None:
        """No thread to end."""

    def text(self) -> NoReturn:
        raise StopTracing

    messages = error = text


class _Answer(SglVariable):
    """What the model will say: it can be appended to a state, and put into a string."""

    def _look(self, *others: Any) -> NoReturn:
        raise StopTracing

    __bool__ = __contains__ = __eq__ = __float__ = __ge__ = __getitem__ = __gt__ = __hash__ = _look
    __index__ = __int__ = __iter__ = __le__ = __len__ = __lt__ = __ne__ = _look

    def __getattr__(self, name: str) -> NoReturn:
        raise StopTracing  # a method of strings

    def __str__(self) -> str:
        return ""

    def __format__(self, specification: str) -> str:
        return ""


def _as_ours(state: TracerProgramState, calls: list[str | None]) -> None:
    state.__class__ = _State
    state.calls = calls
    state.stream_executor = _Executor(state)
