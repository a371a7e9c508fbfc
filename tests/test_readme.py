"""What README and the documentation promise exists, and what is planned does not: commands, options, targets, taps.

A page that tells what is no longer so fails here, not at a reader's.
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import gradctl
from gradctl import _cli, _policy, _taps

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), **PAGES}


def commands(text: str) -> list[list[str]]:
    """The command lines with `gradctl` in fenced blocks and in code spans, from the word on."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:torchrun [^`]*-m )?gradctl [a-z][^`]*)`", text)
    found = [line[line.index("gradctl ") :] for line in lines if re.match(r"(torchrun .*-m )?gradctl [a-z]", line)]
    return [shlex.split(line) for line in found]


PLANNED = {"prove", "doctor", "lint", "stream"}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_command_that_is_shown_is_understood(name: str) -> None:
    for words in commands(TEXTS[name]):
        verb = words[1]
        if verb in PLANNED:
            continue
        command = _cli.gradctl.commands[verb]
        options = {option for parameter in command.params for option in parameter.opts}
        if verb in ("run", "explain"):
            ours, _ = _cli.split_run_arguments(
                words[2:],
                value_options=frozenset({o for p in command.params for o in p.opts if not getattr(p, "is_flag", True)}),
            )
            shown = [word for word in ours if word.startswith("-")]
        else:
            shown = [word.strip("[]") for word in words[2:] if word.strip("[").startswith("-") and word != "-"]
        assert [option for option in shown if option not in options] == [], words


def test_the_feature_table_tells_the_truth() -> None:
    table = README[README.index("## What exists") : README.index("## Limits")]
    rows = re.findall(r"^\| (`.*?) \| (\S+) \|", table, re.MULTILINE)
    assert len(rows) >= 8
    verbs = set(_cli.gradctl.commands)
    for cell, state in rows:
        for code in re.findall(r"`gradctl([ .])([a-z_]+)[^`]*`", cell):
            exists = code[1] in (verbs if code[0] == " " else gradctl.__all__)
            assert exists == (state == "**exists**"), f"{code[1]} is said to be {state}"
    shown = set(re.findall(r"`gradctl ([a-z]+)", table))
    assert verbs <= shown
    assert shown - verbs == PLANNED


def test_every_link_leads_to_a_file() -> None:
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not link.startswith("http"):
                assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.search(r"```\{toctree\}(.*?)```", PAGES["docs/index.md"], re.DOTALL)
    assert listed is not None
    names = {line for line in listed[1].split() if not line.startswith(":")} - {"2"}
    folders = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in ROOT.glob("docs/*/index.md")}
    assert names == {Path(name).stem for name in PAGES} - {"index"} | folders


def test_every_make_target_that_is_named_exists_and_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    named = {
        target
        for text in TEXTS.values()
        for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", text, re.MULTILINE)
        for target in target
        if target
    }
    assert named <= explained
    printed = subprocess.run(["make", "-s", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in printed.splitlines()} == explained


@pytest.mark.parametrize("verb", ["run", "explain"])
def test_every_option_is_documented_and_every_documented_one_exists(verb: str) -> None:
    options = {option for parameter in _cli.gradctl.commands[verb].params for option in parameter.opts}
    table = re.findall(r"^\| (`-.*?) \|", PAGES[f"docs/{verb}.md"], re.MULTILINE)
    documented = {word for cell in table for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", cell)}
    assert documented == {option for option in options if option.startswith("-")}


def test_every_key_of_the_policy_file_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", PAGES["docs/policy.md"], re.MULTILINE))
    defaults = _policy.Policy()
    assert set(rows) | {"source"} == set(_policy.Policy.__dataclass_fields__)
    for key, shown in rows.items():
        value = getattr(defaults, key)
        if value is not None:
            assert shown == f"`{tomllib_text(value)}`", key


def tomllib_text(value: object) -> str:
    """A value as it is written in TOML."""
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
    assert tomllib.loads(f"x = {text}")["x"] == value
    return text


def test_everything_that_is_intercepted_is_listed_in_the_internals() -> None:
    from gradctl._taps import _entries

    page = PAGES["docs/internals.md"]
    table = page[page.index("| tap |") : page.index("`_taps.installed()`")]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert listed == {tap.name for tap in _entries.ALL}
    assert _taps.installed() == []


def test_every_error_is_documented() -> None:
    listed = set(re.findall(r"`gradctl\.(\w+)`", PAGES["docs/errors.md"]))
    errors = {name for name in gradctl.__all__ if isinstance(getattr(gradctl, name), type)}
    assert listed == {name for name in errors if issubclass(getattr(gradctl, name), gradctl.GradctlError | Warning)}


def test_the_names_of_the_policy_are_the_same_in_the_file_as_flags_and_as_keywords() -> None:
    keys = set(_policy.Policy.__dataclass_fields__) - {"source"}
    flags = {parameter.name for parameter in _cli.gradctl.commands["run"].params}
    assert flags - {"policy", "command"} == keys
    assert set(inspect.signature(gradctl.record).parameters) == keys
