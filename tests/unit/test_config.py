"""Flags and environment make the same configuration; mistakes are named."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.config import SGLANG_PIN, EloraConfig, variable_of
from sglang_elora.launch_server import split_arguments

ROOT = Path(__file__).parents[2]


def test_config_defaults_are_off() -> None:
    config = EloraConfig.from_env({})
    assert config == EloraConfig()
    assert not config.enabled
    assert not config.emulates_link


def test_config_environment_round_trips_every_field() -> None:
    config = EloraConfig(
        enabled=True, bad_adapter="exit", link_gbytes_per_s=12.5, link_latency_us=8.0
    )
    environ = {"PATH": "/bin"}
    config.to_env(environ)
    assert len(environ) == 1 + len(fields(EloraConfig))
    assert EloraConfig.from_env(environ) == config


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"SGLANG_ELORA": "maybe"}, "--elora (SGLANG_ELORA) must be 1 or 0"),
        ({"SGLANG_ELORA_LINK_GBYTES_PER_S": "fast"}, "must be a float, got 'fast'"),
        ({"SGLANG_ELORA_LINK_GBYTES_PER_S": "-1"}, "--elora-link-gbytes-per-s"),
        ({"SGLANG_ELORA_LINK_GBYTES_PER_S": "nan"}, "must be finite"),
        ({"SGLANG_ELORA_LINK_LATENCY_US": "5"}, "needs a bandwidth"),
        ({"SGLANG_ELORA_ADAPTER_EVENTS": "1"}, "--elora-adapter-events"),
        ({"SGLANG_ELORA_SESSION_FROM": "user"}, "--elora-session-from"),
        ({"SGLANG_ELORA": "1", "SGLANG_ELORA_SESSION_FROM": "ip,user"}, "got 'ip'"),
        ({"SGLANG_ELORA_BAD_ADAPTER": "ignore"}, "('skip', 'exit')"),
        (
            {"SGLANG_ELORA_POLICY_OFF": "recency"},
            "(SGLANG_ELORA_POLICY_OFF) was removed",
        ),
        ({"SGLANG_ELORA_TYPO": "1"}, "unknown environment variable SGLANG_ELORA_TYPO"),
    ],
)
def test_bad_config_environment_is_refused_naming_the_variable(
    environ: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        EloraConfig.from_env(environ)
    assert named in str(error.value)


def test_flags_win_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ELORA", "1")
    monkeypatch.setenv("SGLANG_ELORA_LINK_GBYTES_PER_S", "10")
    config, rest = split_arguments(
        ["--model-path", "m", "--no-elora", "--elora-link-gbytes-per-s=2.5", "--tp", "2"]
    )
    assert config == EloraConfig(enabled=False, link_gbytes_per_s=2.5)
    assert rest == ["--model-path", "m", "--tp", "2"]


@pytest.mark.parametrize("given", [["--elora-policy-off", "recency"], ["--elora-policy-off=x"]])
def test_removed_flag_is_refused_naming_its_replacement(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--elora-policy-off was removed: .*\+without_recency"):
        split_arguments(["--elora", *given])


def test_unknown_flag_of_ours_is_left_to_sglangs_parser() -> None:
    _, rest = split_arguments(["--elora", "--elora-frobnicate", "3"])
    assert rest == ["--elora-frobnicate", "3"]


def test_help_names_flag_variable_and_default() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    EloraConfig.add_arguments(parser, EloraConfig())
    text = " ".join(parser.format_help().split())
    for item in fields(EloraConfig):
        assert item.metadata["flag"] in text
        assert f"default: {item.default}" in text


def test_docs_list_every_flag_with_its_default() -> None:
    page = (ROOT / "docs" / "flags.md").read_text()
    for item in fields(EloraConfig):
        default = "off" if item.default is False else item.default
        flag = item.metadata["flag"]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{flag}`"))
        assert row.split(" | ")[2].strip(" `") == str(default)


def test_flags_in_the_readme_have_the_defaults_of_the_config() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = [line.split("|") for line in readme.splitlines() if line.startswith("| `--elora")]
    defaults = {flag.strip(" `"): default.strip() for _, flag, default, *_ in rows}
    variables = {item.metadata["flag"]: variable_of(item) for item in fields(EloraConfig)}
    assert len(defaults) == 4
    environ = {variables[flag]: default for flag, default in defaults.items()}
    assert EloraConfig.from_env(environ) == EloraConfig()


@pytest.mark.parametrize(
    "name", ["README.md", "pyproject.toml", "requirements/cpu.lock", "patches/README.md"]
)
def test_sglang_pin_is_the_same_in_every_file(name: str) -> None:
    text = (ROOT / name).read_text()
    assert f"sglang=={SGLANG_PIN}" in text
    assert text.count("sglang==") == text.count(f"sglang=={SGLANG_PIN}")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"check_streams": "latest"}, "needs --elora"),
        ({"check_streams": "soon", "enabled": True}, "must be one of"),
        ({"check_streams": "-1", "enabled": True}, "must be one of"),
        ({"check_streams": "7", "enabled": True, "link_gbytes_per_s": 1.0}, "give one of them"),
    ],
)
def test_check_streams_config_refuses_unsupported_values(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EloraConfig(**values)


@pytest.mark.parametrize("name", ["link_latency_us", "link_to_host_gbytes_per_s"])
def test_options_of_an_emulated_link_need_its_bandwidth(name: str) -> None:
    with pytest.raises(ValueError, match="set --elora-link-gbytes-per-s as well"):
        EloraConfig(**{name: 1.0})  # type: ignore[arg-type]
