"""Table of all hooks that this package installs on SGLang's frontend language."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.frontend import announcing
from sglang_elora.srt.install.hook import Hook, When

HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.lang.interpreter.StreamExecutor.submit",
        ("self", "expr"),
        HookType.BEFORE,
        announcing.announce_queued,
        When.LANG,
        "Backends hear of a call when it runs, not when it is queued.",
    ),
    Hook(
        "sglang.lang.interpreter.StreamExecutor.fork",
        ("self", "size", "position_ids_offset", "lora_path"),
        HookType.BEFORE,
        announcing.announce_branches,
        When.LANG,
        "As above; SGLang does not call BaseBackend.fork_program.",
    ),
    Hook(
        "sglang.lang.interpreter.run_program",
        ("program", "backend", "func_args", "func_kwargs"),
        HookType.BEFORE,
        announcing.announce_traced,
        When.LANG,
        "As above; SGLang does not call BaseBackend.begin_program.",
    ),
)
