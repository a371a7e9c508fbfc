"""The policy: how a run treats gradients, from keywords, flags and the policy file, in that order of precedence.

The file is `gradctl.toml`, or the table `[tool.gradctl]` of `pyproject.toml`, found upward from the working directory.
A key at its top level holds for every verb that knows it; a key in the table `run` holds for `run` and wins there.
Names are the same in the file, as flags and as keywords.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, cast

from gradctl._errors import UnknownPolicyKey, UsageError

Grad = Literal["on", "off"]
OnNonfinite = Literal["continue", "explain", "stop"]

_MODES: dict[str, tuple[str, ...]] = {"grad": ("on", "off"), "on_nonfinite": ("continue", "explain", "stop")}


@dataclass(frozen=True, slots=True)
class Policy:
    """How a run treats gradients and what it leaves behind.

    Args:
        grad: `off` refuses every gradient in the process and its children.
        out: the run directory; None for `gradctl-runs/<script>-<UTC time>[-NAME]`.
        name: a word that ends the name of the run directory.
        plan: a plan of `gradctl fit`, applied to the model in the script that it was made for.
        watch_steps: record only the first steps of each optimizer, and trace them; None records all and traces none.
        on_nonfinite: what to do at the first NaN or inf gradient, before the update is applied.
        lines: record saved bytes by source line.
        report: draw the report when the script ends.
        quiet: say nothing of our own on the terminal.
        force: write into a run directory that already holds a run.
        budget: most of the wall time that sampling may use, as a share between 0 and 1.
        source: the policy file that was read, if any.
    """

    grad: Grad = "on"
    out: Path | None = None
    name: str | None = None
    plan: Path | None = None
    watch_steps: int | None = None
    on_nonfinite: OnNonfinite = "continue"
    lines: bool = False
    report: bool = True
    quiet: bool = False
    force: bool = False
    budget: float = 0.01
    source: Path | None = None


_KEYS = tuple(field.name for field in fields(Policy) if field.name != "source")


def resolve(
    *,
    keywords: Mapping[str, object] | None = None,
    flags: Mapping[str, object] | None = None,
    file: Path | None = None,
    directory: Path | None = None,
) -> Policy:
    """Join keywords, flags and the policy file: keywords beat flags beat the file beat the defaults.

    Args:
        keywords: arguments of a Python call; None values count as not given.
        flags: options of the command line; None values count as not given.
        file: the policy file; None to look for one upward from `directory`.
        directory: where to look; None for the working directory.

    Returns:
        The policy; paths in it are relative to where they were written (`out` of a file to the file's folder).

    Raises:
        UnknownPolicyKey: a key of the file is not known or its value does not fit; names the file and the key's path.
        UsageError: a flag or keyword does not fit; the file is missing, cannot be read or is not TOML.
    """
    policy = Policy()
    source = file if file is not None else find_file(directory)
    if source is not None:
        policy = replace(policy, source=source, **_read(source))
    spelled: tuple[tuple[Mapping[str, object] | None, Callable[[str], str]], ...] = (
        (flags, lambda key: f"--{key.replace('_', '-')}"),
        (keywords, lambda key: key),
    )
    for values, where in spelled:
        given = {key: value for key, value in (values or {}).items() if value is not None}
        policy = replace(policy, **dict(_checked(given, where, fault=UsageError)))
    return policy


def find_file(directory: Path | None = None) -> Path | None:
    """Find the nearest policy file, upward from `directory` (the working directory by default).

    A `pyproject.toml` without `[tool.gradctl]` is passed by; beside one that has it, `gradctl.toml` wins.

    Raises:
        UsageError: a `pyproject.toml` on the way cannot be read or is not TOML.
    """
    start = (directory or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        own, project = folder / "gradctl.toml", folder / "pyproject.toml"
        if own.is_file():
            return own
        if project.is_file() and "gradctl" in _table(_parse(project), "tool"):
            return project
    return None


def _read(file: Path) -> dict[str, Any]:
    """Read the values of a policy file that hold for `run`."""
    document = _parse(file)
    prefix = ""
    if file.name == "pyproject.toml" or "gradctl" in _table(document, "tool"):
        prefix = "tool.gradctl."
        tables = _table(document, "tool")
        if "gradctl" not in tables:
            raise UsageError(f"{file} has no table [tool.gradctl]", fix="add the table, or name another --policy FILE")
        found = tables["gradctl"]
        if not isinstance(found, dict):
            raise UsageError(f"{file}: tool.gradctl is not a table", fix="write [tool.gradctl]")
        document = cast("dict[str, Any]", found)
    general = {key: value for key, value in document.items() if key != "run"}
    of_run = document.get("run", {})
    if not isinstance(of_run, dict):
        raise UnknownPolicyKey(f"{file}: {prefix}run is not a table", fix=f"write [{prefix}run]")

    def where(path: str) -> str:
        return f"{file}: {path}"

    values = dict(_checked(general, where, path=prefix, tables=("run",)))
    values |= dict(_checked(cast("dict[str, Any]", of_run), where, path=f"{prefix}run."))
    for key in ("out", "plan"):
        if values.get(key) is not None:
            values[key] = file.parent / values[key]
    return values


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the policy file {file}", why=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} is not valid TOML", why=str(error), fix="mend it, or name another --policy FILE"
        ) from error


def _table(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _checked(
    values: Mapping[str, object],
    where: Callable[[str], str],
    *,
    path: str = "",
    tables: tuple[str, ...] = (),
    fault: type[UsageError] = UnknownPolicyKey,
) -> Iterator[tuple[str, Any]]:
    """Yield each key with its value as the policy holds it; `where` spells a key's path for the message."""
    for key, value in values.items():
        if key not in _KEYS:
            known = (*_KEYS, *tables)
            # A key written as its flag is the likeliest slip.
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=3, cutoff=0.6)
            raise fault(
                f"{where(path + key)} is not a key that gradctl knows",
                fix=f"did you mean {' or '.join(path + match for match in near)}?"
                if near
                else f"known keys: {', '.join(sorted(known))}",
            )
        try:
            yield key, _value(key, value)
        except ValueError as error:
            raise fault(f"{where(path + key)} cannot be {value!r}", fix=f"give it {error}") from error


def _value(key: str, value: object) -> object:
    """Check and convert one value; the text of the ValueError says what the value must be."""
    if key in _MODES:
        if value in _MODES[key]:
            return value
        raise ValueError(" or ".join(f'"{mode}"' for mode in _MODES[key]))
    if key in ("out", "plan"):
        if isinstance(value, str | Path) and str(value):
            return Path(value)
        raise ValueError("a path")
    if key == "name":
        # It becomes part of a folder's name.
        if isinstance(value, str) and re.fullmatch(r"[\w.+=-]{1,100}", value) and value.strip("."):
            return value
        raise ValueError("a word of letters, digits and . _ - + =")
    if key == "watch_steps":
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        raise ValueError("a whole number of steps above 0")
    if key == "budget":
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
        raise ValueError("a share of wall time above 0 and at most 1")
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
_BY_LOWER = {unit.lower(): (unit, factor) for unit, factor in _UNITS.items()}


def parse_size(size: str | int | float) -> int:
    """Read a size in bytes: `8GiB`, `512MiB`, `1.5 GB`, `1e9`; a bare number is bytes.

    Raises:
        UsageError: not a size, negative, or not a whole number of bytes.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]{1,2})?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    try:
        if match is None or match[2].lower() not in _BY_LOWER:
            raise InvalidOperation
        num_bytes = Decimal(match[1]) * _BY_LOWER[match[2].lower()][1]
    except InvalidOperation:
        raise UsageError(
            f"{size!r} is not a size",
            fix="write 8GiB, 512MiB, 1.5GB, 1e9; a bare number is bytes",
        ) from None
    if isinstance(size, bool) or num_bytes != num_bytes.to_integral_value() or num_bytes >= 2**63:
        raise UsageError(
            f"{size!r} is not a whole number of bytes", fix="write 8GiB, 512MiB, 1e9; a bare number is bytes"
        )
    return int(num_bytes)


def format_size(num_bytes: int) -> str:
    """Write a number of bytes in the largest binary unit that keeps it exact: `8GiB`, `1536MiB`, `1001B`.

    `parse_size` reads it back to the same number.
    """
    for power, prefix in sorted(enumerate("KMGTP", start=1), reverse=True):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{prefix}iB"
    return f"{num_bytes}B"
