"""examples/gradient_reversal.py does what it says: the head it trains against cannot tell, and digits are read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "gradient_reversal.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_gradient_reversal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there for its annotations
    spec.loader.exec_module(module)
    return module


def test_the_head_is_near_chance_with_the_reversal_and_knows_without_it(example: Any) -> None:
    open_, hidden = example.train(0.0, 20), example.train(0.3, 20)
    assert open_.scanner > 0.7
    assert hidden.scanner < 0.65
    assert min(open_.digit, hidden.digit) > 0.88


def test_it_warns_that_a_new_head_still_tells(example: Any) -> None:
    assert example.train(0.3, 20).scanner_by_new_head > 0.8


def test_it_prints_one_line_a_strength(
    example: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gradient_reversal.py", "--epochs", "1"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["strength 0.0", "strength 0.3"]
