"""Patterns choose what a person means by them, and one that chooses nothing says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import settled
from gradctl import PatternMatchesNothing, UsageError
from gradctl._names._patterns import named_modules, named_parameters, other_names, select

settled.compiling()

LAYERS = {
    f"encoder.layer.{n}.{part}": object()
    for n in range(12)
    for part in ("attention.weight", "attention.bias", "norm.weight")
}
NAMES: dict[str, Any] = {"embed.weight": object(), **LAYERS, "head.weight": object(), "head.bias": object()}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["encoder.*"], r"encoder\..*"),
        (["head"], r"head\..*"),
        (["encoder.layer.1"], r"encoder\.layer\.1\..*"),
        (["encoder.layer.1*"], r"encoder\.layer\.1.*"),
        (["encoder.layer.1?"], r"encoder\.layer\.1.\..*"),
        (["encoder.layer.[01]"], r"encoder\.layer\.[01]\..*"),
        (["*.bias"], r".*\.bias"),
        (["*.attention"], r".*\.attention\..*"),
        (["head.bias"], r"head\.bias"),
        (["*"], r".*"),
        (["re:.*norm.*"], r".*norm.*"),
        (["re:head\\.w.*", "embed"], r"head\.weight|embed\.weight"),
        (["encoder", "!encoder.layer.11.*"], r"encoder\.layer\.(?!11)\d+\..*"),
        (["encoder", "!*.bias", "head"], r"encoder.*weight|head\..*"),
        (["!head"], r"(?!head).*"),
        (["!re:.*bias"], r".*weight"),
        ([lambda name, value: "norm" in name], r".*norm.*"),
        ([], r"(?!)"),
    ],
)
def test_a_pattern_chooses_what_the_expression_beside_it_does(patterns: list[Any], expected: str) -> None:
    assert list(select(NAMES, patterns)) == [name for name in NAMES if re.fullmatch(expected, name)]


def test_a_predicate_is_given_the_value_too() -> None:
    named = {"a": torch.zeros(2), "b": torch.zeros(2, 2)}
    assert list(select(named, [lambda name, value: value.dim() == 1])) == ["a"]


def test_an_exact_name_is_taken_as_it_stands_even_with_signs_of_a_glob_in_it() -> None:
    assert list(select({"a[0]": 1, "a0": 2}, ["a[0]"])) == ["a[0]"]


@given(st.lists(st.sampled_from(["encoder", "*.bias", "head", "!*.bias", "!encoder.layer.3", "!head"]), min_size=1))
def test_patterns_apply_in_their_order_like_a_chain_of_set_operations(patterns: list[str]) -> None:
    sets = {
        "encoder": {n for n in NAMES if n.startswith("encoder.")},
        "*.bias": {n for n in NAMES if n.endswith(".bias")},
        "head": {n for n in NAMES if n.startswith("head.")},
        "encoder.layer.3": {n for n in NAMES if n.startswith("encoder.layer.3.")},
    }
    expected: set[str] = set(NAMES) if patterns[0].startswith("!") else set()
    for pattern in patterns:
        what = sets[pattern.removeprefix("!")]
        if not pattern.startswith("!"):
            expected |= what
        elif expected & what:
            expected -= what
        else:
            with pytest.raises(PatternMatchesNothing, match="takes nothing away"):
                select(NAMES, patterns)
            return
    assert set(select(NAMES, patterns)) == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encodr.*", "did you mean 'encoder.*'"),
        ("Head", "did you mean 'head'"),
        ("layer.3.*", "did you mean 'encoder.layer.3.*'?"),
        ("!haed", "did you mean '!head'"),
        ("head.wieght", "did you mean 'head.weight'"),
        ("encoder.layers.3.*", "'encoder.layer.3.*'"),
        ("re:encodr\\..*", "'encoder'"),
        ("zzzzzz", "the model has embed, encoder, head"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_matches(pattern: str, near: str) -> None:
    with pytest.raises(PatternMatchesNothing) as caught:
        select(NAMES, [pattern])
    assert caught.value.headline == f"{pattern!r} matches no parameter"
    assert near in (caught.value.fix or "")


def test_a_predicate_that_chooses_nothing_is_named() -> None:
    def is_lora(name: str, value: object) -> bool:
        return "lora" in name

    with pytest.raises(PatternMatchesNothing, match="the predicate is_lora chooses no parameter"):
        select(NAMES, [is_lora])


def test_a_parameter_or_a_module_stands_for_itself_and_one_of_another_model_is_refused() -> None:
    model, other = Tied(), nn.Linear(3, 4)
    named = named_parameters(model)
    assert list(select(named, [model.block])) == ["block.weight", "block.bias", "again.weight", "again.bias"]
    assert list(select(named, [model.wte.weight])) == ["wte.weight", "lm_head.weight"]
    assert list(select(named_modules(model), [model.block])) == ["block", "again"]
    with pytest.raises(PatternMatchesNothing, match=r"a Parameter of shape \[4, 3\] that is not in the model"):
        select(named, [other.weight])
    with pytest.raises(PatternMatchesNothing, match="a Linear that is not in the model"):
        select(named, [other])


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ("encoder", "a sequence of patterns is needed"),
        (["re:("], "is no regular expression"),
        ([3], "a pattern is a string or a function"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        select(NAMES, patterns)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.block = nn.Linear(3, 3)
        self.again = self.block
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.wte.weight


def test_a_tied_parameter_and_a_shared_module_stand_under_all_their_names() -> None:
    model = Tied()
    named = named_parameters(model)
    assert named == dict(model.named_parameters(remove_duplicate=False))
    assert other_names(named) == {
        "wte.weight": ("lm_head.weight",),
        "lm_head.weight": ("wte.weight",),
        "block.weight": ("again.weight",),
        "block.bias": ("again.bias",),
        "again.weight": ("block.weight",),
        "again.bias": ("block.bias",),
    }


def test_names_are_those_of_the_model_inside_of_its_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    inner = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    compiled = torch.compile(nn.DataParallel(inner), backend="eager")
    assert list(named_parameters(compiled)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(select(named_parameters(compiled), ["0._orig_mod.*"])) == ["0.weight", "0.bias"]


def test_a_module_that_holds_itself_is_walked_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_module("up", model)
    assert list(named_modules(model)) == ["", "0"]
    assert list(named_parameters(model)) == ["0.weight", "0.bias"]
