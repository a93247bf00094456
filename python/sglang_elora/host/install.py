"""Install what the configuration selects: preflight, apply, verify. Once per process.

SGLang calls our plugin, then those of other packages in no promised order, and
then applies all registered hooks together, logging failures and going on. So
the verification runs behind that step: it finds hooks that were not applied,
and functions that another plugin replaced after ours.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import pkgutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_elora.config import SGLANG_PIN, EloraConfig
from sglang_elora.host import lora_backend, messages, radix_cache
from sglang_elora.host.hooks import Hook, selected_hooks
from sglang_elora.host.link import use_emulated_link
from sglang_elora.host.patching import Patch, apply_patch, is_applied, load_patches
from sglang_elora.host.patching import preflight as preflight_patch

logger = logging.getLogger(__name__)


class SeamError(RuntimeError):
    """SGLang is not as the pinned version has it, or something took one of our places."""


def install(config: EloraConfig) -> None:
    """Apply the selected patches, register the selected hooks, arrange their verification.

    Raises:
        SeamError: A target is missing or differs; the text names each one.
    """
    problems = preflight(config)
    if problems:
        raise SeamError(_report("cannot be installed", problems))
    hooks, patches = selected_hooks(config), selected_patches(config)
    if config.emulates_link:
        use_emulated_link(config)
    if config.enabled:
        radix_cache.register_backend()
        lora_backend.register_backends(config.max_adapters_per_batch)
        messages.register_types()
    for patch in patches:
        apply_patch(patch)
    for hook in hooks:
        HookRegistry.register(hook.target, hook.body, hook.kind)
    _verify_once_applied(hooks, patches)
    if config.enabled and multiprocessing.parent_process() is None:
        logger.warning(
            "ELORA is on: LoRA adapters and KV share one pool and one radix tree. "
            "--max-loras-per-batch has no effect: a batch holds the adapters that fit."
        )


def selected_patches(config: EloraConfig) -> tuple[Patch, ...]:
    return load_patches() if config.enabled else ()


def preflight(config: EloraConfig) -> list[str]:
    """What would keep the selection from being installed; empty if nothing."""
    problems = _version_problems()
    for patch in selected_patches(config):
        problems += preflight_patch(patch)
    for hook in selected_hooks(config):
        problems += _hook_problems(hook)
    return problems


def missing(config: EloraConfig) -> list[str]:
    """Which selected hooks and patches are not in effect in this process."""
    return _not_in_effect(selected_hooks(config), selected_patches(config))


def _version_problems() -> list[str]:
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "none"
    if installed == SGLANG_PIN:
        return []
    return [f"sglang {installed} is installed, this package is for sglang=={SGLANG_PIN}"]


def _hook_problems(hook: Hook) -> list[str]:
    try:
        target = pkgutil.resolve_name(hook.target)
        names = tuple(inspect.signature(target).parameters)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return [f"hook target {hook.target} is not there: {error}"]
    expected = hook.parameters
    if names[: len(expected)] != expected and names[:1] != ("args",):
        return [f"hook target {hook.target} takes {names}, expected {expected} first"]
    return []


def _verify_once_applied(hooks: tuple[Hook, ...], patches: tuple[Patch, ...]) -> None:
    """Have the next ``HookRegistry.apply_hooks`` followed by our verification."""
    upstream: Any = HookRegistry.__dict__["apply_hooks"]

    def apply_hooks() -> None:
        HookRegistry.apply_hooks = upstream
        HookRegistry.apply_hooks()
        problems = _not_in_effect(hooks, patches)
        if problems:
            raise SystemExit(f"sglang_elora: {_report('is not in effect', problems)}")

    HookRegistry.apply_hooks = apply_hooks


def _not_in_effect(hooks: tuple[Hook, ...], patches: tuple[Patch, ...]) -> list[str]:
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
    """What the wrapper chain that ``HookRegistry`` builds around a target closes over."""
    while target is not None:
        for cell in getattr(target, "__closure__", None) or ():
            yield cell.cell_contents
        target = getattr(target, "__wrapped__", None)


def _report(what: str, problems: list[str]) -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"ELORA {what} on this SGLang:\n{lines}\n"
        f"Install sglang=={SGLANG_PIN} unmodified, remove the plugin that is in the way, "
        "or start without --elora."
    )
