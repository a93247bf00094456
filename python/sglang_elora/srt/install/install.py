"""Installs the selected hooks and patches, once per process: preflight, apply, verify.

SGLang calls the plugins of all packages in no defined order, then applies all registered hooks and
only logs failures. So the verification runs after that step: it detects hooks that were not
applied, and functions that another plugin replaced after ours.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_elora.config import EloraConfig
from sglang_elora.srt import messages
from sglang_elora.srt.install.attributes import attribute_problems
from sglang_elora.srt.install.crash_end import end_without_empty_diagnostics
from sglang_elora.srt.install.hook import Hook, When
from sglang_elora.srt.install.hooks import selected_hooks
from sglang_elora.srt.install.overrides import override_problems
from sglang_elora.srt.install.patching import Patch, apply_patch, load_patches
from sglang_elora.srt.install.patching import preflight as preflight_patch
from sglang_elora.srt.install.verify import (
    SeamError,
    hook_problems,
    not_in_effect,
    report,
    version_problems,
)
from sglang_elora.srt.lora import registry
from sglang_elora.srt.mem_cache.link import use_emulated_link
from sglang_elora.srt.scheduler import assembly
from sglang_elora.srt.scheduler.stream_check import use_adversarial_streams

logger = logging.getLogger(__name__)


def install(config: EloraConfig) -> None:
    """Apply the selected patches, register the selected hooks, and schedule their verification.

    Raises:
        SeamError: A target is missing or differs; the text names each one.
    """
    problems = preflight(config)
    if problems:
        raise SeamError(report("cannot be installed", problems))
    hooks, patches = selected_hooks(config), selected_patches(config)
    if config.emulates_link:
        use_emulated_link(config)
    if config.check_streams:
        use_adversarial_streams(config)
    if config.enabled:
        end_without_empty_diagnostics(os.environ)
        assembly.register_backend()
        registry.register_backends(config.max_adapters_per_batch)
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
    return tuple(patch for patch in load_patches() if When(patch.when).selected_by(config))


def preflight(config: EloraConfig) -> list[str]:
    """The problems that prevent the installation of the selection; empty if none."""
    problems = version_problems()
    for patch in selected_patches(config):
        problems += preflight_patch(patch)
    for hook in selected_hooks(config):
        problems += hook_problems(hook)
    if config.enabled:
        problems += override_problems()
        problems += attribute_problems()
    return problems


def missing(config: EloraConfig) -> list[str]:
    """The selected hooks and patches that are not in effect in this process."""
    return not_in_effect(selected_hooks(config), selected_patches(config))


def _verify_once_applied(hooks: tuple[Hook, ...], patches: tuple[Patch, ...]) -> None:
    """Make the next ``HookRegistry.apply_hooks`` run the verification after itself."""
    upstream: Any = HookRegistry.__dict__["apply_hooks"]

    def apply_hooks() -> None:
        HookRegistry.apply_hooks = upstream
        HookRegistry.apply_hooks()
        problems = not_in_effect(hooks, patches)
        if problems:
            raise SystemExit(f"sglang_elora: {report('is not in effect', problems)}")

    HookRegistry.apply_hooks = apply_hooks
