"""The policy file, sizes, and who beats whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl._errors import UnknownPolicyKey, UsageError
from gradctl._policy import Policy, find_file, format_size, parse_size, resolve


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert resolve(directory=tmp_path) == Policy()
    assert Policy() == Policy(grad="on", on_nonfinite="continue", report=True, quiet=False, budget=0.01, source=None)


@pytest.mark.parametrize(
    ("name", "head"),
    [("gradctl.toml", ""), ("pyproject.toml", "[tool.gradctl]\n"), ("other.toml", "[tool.gradctl]\n")],
)
def test_the_file_sets_every_key(tmp_path: Path, name: str, head: str) -> None:
    file = write(
        tmp_path / name,
        f'{head}grad = "off"\nout = "runs/a"\nname = "night-1"\nwatch_steps = 5\non_nonfinite = "stop"\nlines = true\n'
        "report = false\nquiet = true\nforce = true\nbudget = 0.05\n",
    )
    assert resolve(file=file) == Policy(
        grad="off",
        out=tmp_path / "runs" / "a",
        name="night-1",
        watch_steps=5,
        on_nonfinite="stop",
        lines=True,
        report=False,
        quiet=True,
        force=True,
        budget=0.05,
        source=file,
    )


def test_the_table_run_beats_the_top_level_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "gradctl.toml", 'quiet = true\ngrad = "off"\n[run]\ngrad = "on"\n')
    policy = resolve(file=file)
    assert (policy.grad, policy.quiet) == ("on", True)


def test_keywords_beat_flags_beat_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "gradctl.toml", 'name = "file"\nwatch_steps = 1\nquiet = true\n')
    policy = resolve(file=file, flags={"name": "flag", "watch_steps": 2, "quiet": None}, keywords={"name": "keyword"})
    assert (policy.name, policy.watch_steps, policy.quiet) == ("keyword", 2, True)


def test_a_false_flag_is_not_the_same_as_no_flag(tmp_path: Path) -> None:
    file = write(tmp_path / "gradctl.toml", "report = true\nquiet = true\n")
    policy = resolve(file=file, flags={"report": False}, keywords={"quiet": False})
    assert (policy.report, policy.quiet) == (False, False)


def test_the_nearest_file_upward_is_found_and_a_foreign_pyproject_is_passed_by(tmp_path: Path) -> None:
    outer = write(tmp_path / "pyproject.toml", "[tool.gradctl]\nquiet = true\n")
    write(tmp_path / "a" / "pyproject.toml", "[tool.ruff]\nline-length = 100\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir()
    assert find_file(deep) == outer
    inner = write(tmp_path / "a" / "gradctl.toml", "")
    assert find_file(deep) == inner


def test_gradctl_toml_wins_beside_a_pyproject(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", "[tool.gradctl]\nquiet = true\n")
    own = write(tmp_path / "gradctl.toml", "")
    assert find_file(tmp_path) == own


def test_the_search_starts_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "gradctl.toml", "lines = true")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert resolve() == Policy(lines=True, source=file)


@pytest.mark.parametrize(
    ("name", "text", "path", "near"),
    [
        ("pyproject.toml", "[tool.gradctl.run]\nwatch-steps = 3", "tool.gradctl.run.watch-steps", "run.watch_steps"),
        ("pyproject.toml", "[tool.gradctl]\ngrads = 'off'", "tool.gradctl.grads", "tool.gradctl.grad"),
        ("gradctl.toml", "[run]\nquite = true", "run.quite", "run.quiet"),
        ("gradctl.toml", "[rum]\nquiet = true", "rum", "run"),
        ("gradctl.toml", "source = 'x'", "source", "that gradctl knows"),
        ("gradctl.toml", "zzz = 1", "zzz", "known keys: budget, force"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_its_path_and_what_was_meant(
    tmp_path: Path, name: str, text: str, path: str, near: str
) -> None:
    file = write(tmp_path / name, text)
    with pytest.raises(UnknownPolicyKey) as caught:
        resolve(file=file)
    message = str(caught.value)
    assert f"{file}: {path} is not a key" in message
    assert near in message


@pytest.mark.parametrize(
    ("line", "must"),
    [
        ('grad = "of"', '"on" or "off"'),
        ("grad = true", '"on" or "off"'),
        ('on_nonfinite = "panic"', '"continue" or "explain" or "stop"'),
        ("watch_steps = 0", "a whole number of steps above 0"),
        ("watch_steps = true", "a whole number of steps above 0"),
        ('watch_steps = "5"', "a whole number of steps above 0"),
        ("watch_steps = 2.0", "a whole number of steps above 0"),
        ("budget = 0", "a share of wall time"),
        ("budget = nan", "a share of wall time"),
        ("budget = 1.5", "a share of wall time"),
        ("quiet = 1", "true or false"),
        ('report = "no"', "true or false"),
        ('out = ""', "a path"),
        ("out = 5", "a path"),
        ('name = "a/b"', "a word of letters"),
        ('name = ".."', "a word of letters"),
        ('name = "a\\u0000"', "a word of letters"),
        ("[[run]]", "run is not a table"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_says_what_would_fit(tmp_path: Path, line: str, must: str) -> None:
    file = write(tmp_path / "gradctl.toml", line)
    with pytest.raises(UnknownPolicyKey) as caught:
        resolve(file=file)
    assert must in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_flag_that_does_not_fit_is_spelled_as_a_flag_and_a_keyword_as_a_keyword(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--watch-steps cannot be 0"):
        resolve(directory=tmp_path, flags={"watch_steps": 0})
    with pytest.raises(UsageError, match="watch_steps cannot be 0"):
        resolve(directory=tmp_path, keywords={"watch_steps": 0})


def test_a_policy_file_that_is_missing_broken_or_without_our_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the policy file"):
        resolve(file=tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot read the policy file"):
        resolve(file=tmp_path)
    with pytest.raises(UsageError, match="not valid TOML") as caught:
        resolve(file=write(tmp_path / "gradctl.toml", "a = = 1"))
    assert "line 1" in str(caught.value)
    with pytest.raises(UsageError, match=r"no table \[tool.gradctl\]"):
        resolve(file=write(tmp_path / "pyproject.toml", "[tool.ruff]"))
    with pytest.raises(UsageError, match=r"tool\.gradctl is not a table"):
        resolve(file=write(tmp_path / "pyproject.toml", "[tool]\ngradctl = 3"))
    (tmp_path / "gradctl.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(UsageError, match="not valid TOML"):
        resolve(file=tmp_path / "gradctl.toml")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1e9", 10**9),
        ("1.5GB", 1_500_000_000),
        ("0.5 KiB", 512),
        ("2tib", 2 << 40),
        ("7b", 7),
        ("0", 0),
        (4096, 4096),
        (1e9, 10**9),
    ],
)
def test_sizes(text: str | int | float, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1.2.3", "8 GIGS", "1e", "0.3B", "nan", "inf", "1e40", "1e999999999", True, "८", "1_000"]
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="8GiB, 512MiB"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_every_size_is_read_back_as_it_was_written(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes
    assert parse_size(num_bytes) == parse_size(str(num_bytes)) == num_bytes


@given(st.integers(min_value=1, max_value=1023), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "PiB"]))
def test_a_round_size_keeps_its_unit(count: int, unit: str) -> None:
    assert format_size(parse_size(f"{count}{unit}")) == f"{count}{unit}"


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 2**63
    except UsageError:
        pass
