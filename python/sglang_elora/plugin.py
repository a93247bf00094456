"""Entry points through which SGLang finds this package.

SGLang only logs an exception raised inside a plugin and continues without the plugin.
A server that silently runs without what the user asked for is worse than none,
so any failure here ends the process.

This module imports nothing heavy: SGLang would swallow an import error too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_WITHOUT_ADAPTERS = ("sglang::detokenizer", "sglang::data_parallel_controller")


def left_out(environ: Mapping[str, str]) -> str | None:
    """Why SGLang will skip this package's plugins: the environment variable that excludes them and
    the remedy. None if no variable does."""
    allowed = environ.get("SGLANG_PLUGINS", "")
    if allowed and not {"elora", "elora_cpu"} <= {name.strip() for name in allowed.split(",")}:
        return f"SGLANG_PLUGINS={allowed!r} leaves out 'elora' or 'elora_cpu': add both"
    platform = environ.get("SGLANG_PLATFORM", "")
    if platform not in ("", "elora_cpu"):
        return (
            f"SGLANG_PLATFORM={platform!r} makes SGLang skip every other package that offers a "
            "platform, this one too: unset it, SGLang finds the platform by itself"
        )
    return None


def passes_messages_on() -> bool:
    """Whether this process is SGLang's detokenizer or data-parallel controller. SGLang sets the
    process title, which is read here, before it loads plugins."""
    import setproctitle

    return setproctitle.getproctitle().startswith(_WITHOUT_ADAPTERS)


def load() -> None:
    """Entry point ``sglang.srt.plugins``: install what the configuration selects.

    Called by SGLang in every process, before the engine is built. In a process that only forwards
    messages nothing is installed, so it does not import the scheduler.

    Raises:
        SystemExit: The configuration is invalid, or a patched function of SGLang differs from
            the pinned version's.
    """
    try:
        from sglang_elora.config import EloraConfig, activate

        config = EloraConfig.from_env(os.environ)
        activate(config)
        if config.selects_anything and passes_messages_on():
            return
        if config.emulates_link:
            from sglang_elora.platforms.selection import require_cpu_platform

            require_cpu_platform("--elora-link-gbytes-per-s")
        if config.check_streams:
            from sglang_elora.platforms.selection import require_cpu_platform

            require_cpu_platform("--elora-check-streams")
        if config.selects_anything:
            from sglang_elora.srt.install.install import install

            install(config)
    except Exception as error:
        raise SystemExit(f"sglang_elora: {error}") from error


def activate_cpu_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the CPU platform, if the machine has no accelerator.

    Returns:
        The dotted name of the platform class, or None to decline: an
        accelerator is present, or SGLang's own AMX engine was asked for.
    """
    try:
        from sglang_elora.platforms.selection import cpu_platform_declined

        if cpu_platform_declined() is not None:
            return None
        from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

        ensure_torchvision_importable()
        return "sglang_elora.platforms.cpu.EloraCpuPlatform"
    except Exception as error:
        raise SystemExit(f"sglang_elora: CPU platform: {error}") from error
