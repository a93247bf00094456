"""Checks that SGLang's classes have the methods that ELORA's subclasses override.

If SGLang renames a method, the override is silently never called. So each override of a method of
SGLang is marked with ``typing_extensions.override``, and checked here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_OURS, _SGLANG = "sglang_elora", "sglang"
_IMPORTED_LATER = (f"{_OURS}.srt.lora.torch_backend", f"{_OURS}.srt.lora.triton_backend")


def override_problems() -> list[str]:
    """Marked overrides without a base method, in the modules of this package loaded so far."""
    for module in _IMPORTED_LATER:
        importlib.import_module(module)
    return [
        f"{cls.__module__}.{cls.__qualname__}.{name} overrides nothing: no class of SGLang above "
        "it has such a method"
        for cls in subclasses_of_sglang()
        for name, member in vars(cls).items()
        if _is_marked(member) and not _is_overriding(cls, name)
    ]


def unmarked_overrides(classes: Iterable[type]) -> list[str]:
    """Methods of ``classes`` that override one of SGLang's without the mark."""
    return [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in classes
        for name, member in vars(cls).items()
        if _is_method(member) and not _is_special(name)
        if _is_overriding(cls, name) and not _is_marked(member)
    ]


def subclasses_of_sglang() -> Iterator[type]:
    """Classes in the loaded modules of this package that are derived from a class of SGLang."""
    for module in [m for name, m in sys.modules.items() if _is_in(_OURS, name)]:
        for value in vars(module).values():
            is_class = isinstance(value, type) and value.__module__ == module.__name__
            if is_class and any(_is_in(_SGLANG, base.__module__) for base in value.__mro__):
                yield value


def _is_overriding(cls: type, name: str) -> bool:
    """Whether a base class outside this package has the name."""
    return any(
        name in vars(base)
        for base in cls.__mro__[1:]
        if base is not object and not _is_in(_OURS, base.__module__)
    )


def _is_in(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _functions(member: Any) -> list[Any]:
    """The functions of a member: itself, the one wrapped by a class or static method, a getter."""
    return [member, getattr(member, "__func__", None), getattr(member, "fget", None)]


def _is_method(member: Any) -> bool:
    return isinstance(member, (classmethod, staticmethod, property)) or callable(member)


def _is_marked(member: Any) -> bool:
    return any(getattr(function, "__override__", False) for function in _functions(member))
