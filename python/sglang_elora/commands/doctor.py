"""``sglang-elora doctor``: report whether this machine is ready, and what a start would select."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, version

from sglang_elora.config import SGLANG_PIN, EloraConfig
from sglang_elora.plugin import left_out

_GROUPS = {"sglang.srt.plugins": "elora", "sglang.srt.platforms": "elora_cpu"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``remedy`` says what to do; it is empty if there is no problem."""

    topic: str
    text: str
    remedy: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        mark = "FAIL" if self.fatal else "warn" if self.remedy else "ok"
        line = f"[{mark:>4}] {self.topic}: {self.text}"
        return f"{line}\n       -> {self.remedy}" if self.remedy else line


def findings() -> Iterator[Finding]:
    """All findings, in the order in which a server start would meet them."""
    yield from _versions()
    yield from _entry_points()
    try:
        config = EloraConfig.from_env(os.environ)
    except ValueError as error:
        yield Finding("configuration", str(error), "Correct or unset the variable.", fatal=True)
        config = EloraConfig()
    else:
        yield Finding("configuration", str(config))
    try:
        import torch  # noqa: F401
        from sglang.srt.plugins import hook_registry  # noqa: F401
    except ImportError as error:
        yield Finding("import", f"torch or sglang does not import: {error}", _INSTALL, fatal=True)
        return
    yield from _platform(config)
    yield from _seams(config)


_INSTALL = (
    "On a CUDA machine: pip install '.[cuda]' in a checkout. On a CPU machine: make install "
    "(it installs requirements/cpu.lock)."
)


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.machine()}")
    for name in ("sglang-elora", "torch", "transformers", "triton", "flashinfer-python", "pyzmq"):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "not installed")
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        yield Finding("sglang", "not installed", _INSTALL, fatal=True)
        return
    if installed == SGLANG_PIN:
        yield Finding("sglang", f"{installed}, as pinned")
    else:
        remedy = f"pip install sglang=={SGLANG_PIN}"
        yield Finding("sglang", f"{installed}, pinned is {SGLANG_PIN}", remedy, fatal=True)


def _entry_points() -> Iterator[Finding]:
    for group, ours in _GROUPS.items():
        names = sorted(point.name for point in entry_points(group=group))
        if ours not in names:
            yield Finding(
                group, f"{ours!r} is not registered", "Reinstall this package.", fatal=True
            )
            continue
        others = [name for name in names if name != ours]
        yield Finding(
            group, f"{ours!r} is registered" + (f", beside {', '.join(others)}" if others else "")
        )
    reason = left_out(os.environ)
    if reason is not None:
        yield Finding("environment", reason, "Change the variable as it says.", fatal=True)


def _platform(config: EloraConfig) -> Iterator[Finding]:
    from sglang_elora.platforms.selection import cpu_platform_declined

    declined = cpu_platform_declined()
    if declined is None:
        from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

        stand_in = ", with stand-ins for torchvision's operators"
        yield Finding(
            "platform",
            "the CPU platform of this package (no accelerator found)"
            + (stand_in if ensure_torchvision_importable() else ""),
        )
        yield _threads()
    else:
        yield Finding("platform", f"SGLang's own: {declined}")
    for name, variable, is_set in (
        ("emulated link", "SGLANG_ELORA_LINK_GBYTES_PER_S", config.emulates_link),
        ("check of streams", "SGLANG_ELORA_CHECK_STREAMS", bool(config.check_streams)),
    ):
        if is_set and declined is not None:
            yield Finding(
                name,
                f"asked for, but {declined}",
                f"Unset {variable}; it is for the CPU platform.",
                fatal=True,
            )


def _threads() -> Finding:
    from sglang_elora.platforms.threads import VARIABLE, default_threads, usable_cores

    if chosen := os.environ.get(VARIABLE):
        return Finding("threads", f"{VARIABLE}={chosen}, from the environment")
    num = default_threads(None, 1, usable_cores())
    return Finding("threads", f"{VARIABLE}={num} will be set for a server; 1 for a small model")


def _seams(config: EloraConfig) -> Iterator[Finding]:
    try:
        from sglang_elora.srt.install.hooks import selected_hooks
        from sglang_elora.srt.install.install import preflight, selected_patches
    except ImportError as error:
        problem = f"a name that ELORA uses is missing from SGLang: {error}"
        yield Finding("seam", problem, f"Install sglang=={SGLANG_PIN} unmodified.", fatal=True)
        return

    with_elora = replace(config, enabled=True)
    problems = preflight(with_elora)
    for problem in problems:
        yield Finding("seam", problem, f"Install sglang=={SGLANG_PIN} unmodified.", fatal=True)
    state = "would be applied" if not config.enabled else "are selected"
    note = "" if config.enabled else " by --elora or SGLANG_ELORA=1"
    for hook in selected_hooks(with_elora):
        yield Finding(f"hook ({hook.kind.value})", hook.target)
    for patch in selected_patches(with_elora):
        yield Finding("patch", f"{patch.name}: {patch.target}")
    yield Finding("selection", f"the hooks and patches above {state}{note}")


def main() -> int:
    """Print the report; 1 if a start with ELORA would fail."""
    warnings.simplefilter("ignore")  # SGLang's warnings at import are not part of the report
    report = []
    for finding in findings():
        print(finding)
        report.append(finding)
    failures = sum(finding.fatal for finding in report)
    print("\nReady." if not failures else f"\n{failures} problem(s) to solve before a start.")
    return 1 if failures else 0
