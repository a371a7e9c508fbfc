"""The one list of public names: what it holds, that it is documented, and that importing it does nothing."""

from __future__ import annotations

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradctl

ROOT = Path(__file__).parents[1]
ERRORS = {
    "BackwardRefused", "BadJournal", "BadVjp", "BrokenGradients", "BudgetTooSmall", "FreezeRefused", "GradctlError",
    "NoSecondDerivative", "NonFiniteGradient", "NotPerSample", "PatternMatchesNothing", "PlanMismatch",
    "PrecisionRefused", "RunDirectoryError", "StaleSource", "SwitchFailed", "TornStep", "UnfinishedStep",
    "UnknownPolicyKey", "UsageError", "WrongGradient",
}  # fmt: skip
VALUES = {"Finding", "Findings", "Journal"}
WARNINGS = {"PlanNotFollowed", "TornStepWarning"}
VERBS = {"explain", "off", "is_off", "record", "watch"}
CALLS = {
    "backward_with", "check", "clip", "custom_vjp", "fit", "freeze", "ggnvp", "gradient_noise_scale",
    "gradient_penalty", "hessian_diagonal", "hvp", "jacobian", "jvp", "memory", "per_sample_grads",
    "per_sample_norms", "precision", "recompute", "replace", "reverse", "scale", "sharpness", "stop",
    "straight_through", "trainable", "unfreeze", "unfreeze_by_step", "unrolled", "vjp",
}  # fmt: skip
OBJECTS = {"GGNOperator", "HessianOperator", "JacobianOperator", "MemoryReport", "Plan", "Step"}
MODULES = {"callbacks", "testing"}


def test_public_names_are_frozen_and_sorted() -> None:
    assert set(gradctl.__all__) == ERRORS | VALUES | VERBS | CALLS | OBJECTS | WARNINGS | MODULES | {"__version__"}
    assert gradctl.__all__ == sorted(gradctl.__all__)
    assert dir(gradctl) == gradctl.__all__


def test_every_public_name_resolves_and_is_kept() -> None:
    for name in gradctl.__all__:
        assert getattr(gradctl, name) is getattr(gradctl, name)
        if name in ERRORS:
            assert issubclass(getattr(gradctl, name), gradctl.GradctlError)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_an_error_is_shown_by_the_path_by_which_it_is_imported_and_survives_pickling(name: str) -> None:
    kind = getattr(gradctl, name)
    assert (kind.__module__, kind.__qualname__) == ("gradctl", name)
    error = pickle.loads(pickle.dumps(kind("headline", what="a", why="b", fix="c")))
    assert type(error) is kind
    assert str(error) == "headline\n  what  a\n  why   b\n  fix   c"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gradctl' has no attribute 'freez'"):
        gradctl.freez  # noqa: B018
    with pytest.raises(ImportError):
        from gradctl import freez  # noqa: F401


def test_the_error_tree_is_the_one_that_its_module_draws() -> None:
    from gradctl import _errors

    drawn = re.findall(r"^ *(\w+)", (_errors.__doc__ or "").split("\n\n")[1], re.MULTILINE)
    assert set(drawn) == ERRORS
    assert {name for name in vars(_errors) if isinstance(getattr(_errors, name), type)} & ERRORS == ERRORS


def test_the_type_checkers_see_the_same_names_as_the_interpreter() -> None:
    tree = ast.parse((ROOT / "src/gradctl/__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen | {"__version__"} == set(gradctl.__all__)


def test_importing_touches_nothing_and_loads_no_torch() -> None:
    code = (
        "import sys, os, json, threading, logging, warnings, signal\n"
        "look = lambda: (dict(os.environ), list(sys.path), list(sys.meta_path), threading.enumerate(),\n"
        "    list(logging.root.handlers), list(warnings.filters), sys.excepthook, signal.getsignal(signal.SIGTERM))\n"
        "before = look()\n"
        "import gradctl; dir(gradctl); gradctl.__version__\n"
        "ours = [name for name in sys.modules if name.startswith('gradctl')]\n"
        "print(json.dumps([before == look(), 'torch' in sys.modules, ours]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, ["gradctl"]]


@pytest.mark.parametrize("name", sorted(ERRORS | VALUES))
def test_errors_and_values_need_no_torch(name: str) -> None:
    code = f"import sys, gradctl; gradctl.{name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asking_whether_gradients_are_off_loads_no_torch() -> None:
    code = "import sys, gradctl; assert gradctl.is_off() is False; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for name in set(gradctl.__all__) - {"__version__"}:
        assert re.search(rf"`(gradctl\.)?{name}\b", pages), f"{name} is on no page of docs/"


def test_every_name_that_the_documentation_uses_exists() -> None:
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        for name in re.findall(r"\bgradctl\.(\w+)\(", page.read_text(encoding="utf-8")):
            assert name in gradctl.__all__, f"{page.name} uses gradctl.{name}"


def test_the_version_of_the_package_is_the_one_it_tells() -> None:
    import importlib.metadata

    assert importlib.metadata.version("gradctl") == gradctl.__version__
