"""Checks that SGLang has the targets of hooks and patches, and that these are in effect."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_elora.config import SGLANG_PIN
from sglang_elora.srt.install.hook import Hook
from sglang_elora.srt.install.patching import Patch, is_applied


class SeamError(RuntimeError):
    """SGLang differs from the pinned version, or another plugin replaced a target of ours."""


def version_problems() -> list[str]:
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "none"
    if installed == SGLANG_PIN:
        return []
    return [f"sglang {installed} is installed, this package is for sglang=={SGLANG_PIN}"]


def hook_problems(hook: Hook) -> list[str]:
    try:
        target = pkgutil.resolve_name(hook.target)
        names = tuple(inspect.signature(target).parameters)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return [f"hook target {hook.target} is not there: {error}"]
    expected = hook.parameters
    if names[: len(expected)] != expected and names[:1] != ("args",):
        return [f"hook target {hook.target} takes {names}, expected {expected} first"]
    return []


def not_in_effect(hooks: tuple[Hook, ...], patches: tuple[Patch, ...]) -> list[str]:
    problems = []
    for hook in hooks:
        try:
            target = pkgutil.resolve_name(hook.target)
        except AttributeError as error:
            problems.append(f"hook target {hook.target} is not there: {error}")
            continue
        if target is not hook.body and not any(
            function is hook.body for function in _functions_around(target)
        ):
            problems.append(
                f"hook target {hook.target} runs without our hook (another plugin replaced it?)"
            )
    problems += [
        f"patch {patch.name} of {patch.target} is not in effect (another plugin replaced it?)"
        for patch in patches
        if not is_applied(patch)
    ]
    return problems


def _functions_around(target: Any) -> Iterator[Any]:
    """The closure contents of the wrappers that ``HookRegistry`` builds around a target."""
    while target is not None:
        for cell in getattr(target, "__closure__", None) or ():
            yield cell.cell_contents
        target = getattr(target, "__wrapped__", None)


def report(what: str, problems: list[str], without: str = "--elora") -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"ELORA {what} on this SGLang:\n{lines}\n"
        f"Install sglang=={SGLANG_PIN} unmodified, remove the plugin that is in the way, "
        f"or start without {without}."
    )
