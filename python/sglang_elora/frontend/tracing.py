"""Tracing of a frontend program without model calls, to find the adapters that it will use."""

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
    """Allow tracing the program before each of its runs; returns it."""
    setattr(program, _MARK, True)
    return program


def is_traced(program: SglFunction) -> bool:
    return getattr(program, _MARK, False)


def refuse_inside() -> None:
    """Raise StopTracing if this thread is tracing, so that a trace never runs another program that
    the traced body calls."""
    if getattr(_here, "tracing", False):
        raise StopTracing


def adapters(
    program: SglFunction, backend: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> list[str | None]:
    """The adapter of each call, in order, up to the first use of a model answer.

    None and "" are the base model. Inserting an answer into the text is allowed; the trace ends
    where the program reads an answer in any other way.
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
    except Exception as error:  # noqa: BLE001  # if it is real, the program's run raises it too
        logger.debug("%s is traced in part: %r", program.func, error)
    finally:
        _here.tracing = False
    return state.calls


class _State(TracerProgramState):
    """SGLang's tracer, which records its own calls and its forks', and stops when an answer is
    read. It opens no tracing scope, so that programs called in the body are not traced."""

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
        if isinstance(found, list):  # the variables of joined forks
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
        """No operation: SGLang's tracer creates the variable at the end of the scope."""

    def _note(self, expr: SglGen | SglSelect) -> None:
        self.calls.append(self.lora_path if expr.lora_path is None else expr.lora_path)


class _Executor:
    """The parts of a ``StreamExecutor`` that ``ProgramState`` uses and the tracer lacks."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self.variables = state.variables

    def submit(self, expr: SglExpr) -> None:
        self._state._execute(expr)

    def set_var(self, name: str, value: Any) -> None:
        raise StopTracing

    def sync(self) -> None:
        """No operation: ``submit`` executes immediately."""

    def end(self) -> None:
        """No operation: there is no thread to end."""

    def text(self) -> NoReturn:
        raise StopTracing

    messages = error = text


class _Answer(SglVariable):
    """Placeholder of a model answer: it can be appended to a state or formatted into a string;
    any other use stops the trace."""

    def _look(self, *others: Any) -> NoReturn:
        raise StopTracing

    __bool__ = __contains__ = __eq__ = __float__ = __ge__ = __getitem__ = __gt__ = __hash__ = _look
    __index__ = __int__ = __iter__ = __le__ = __len__ = __lt__ = __ne__ = _look

    def __getattr__(self, name: str) -> NoReturn:
        raise StopTracing  # the program calls a method of str

    def __str__(self) -> str:
        return ""

    def __format__(self, specification: str) -> str:
        return ""


def _as_ours(state: TracerProgramState, calls: list[str | None]) -> None:
    state.__class__ = _State
    state.calls = calls
    state.stream_executor = _Executor(state)
