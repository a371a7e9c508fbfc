"""Rounding float32 to bfloat16: nothing lost, nothing biased."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradctl._precision._rounding import join, round_stochastically, split

ODD = [0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0xBF808000, 0x007FFFFF]
BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40).map(lambda found: found + ODD)


def floats(bits: list[int]) -> torch.Tensor:
    signed = [value - (1 << 32) if value >> 31 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(BITS)
def test_what_split_takes_apart_join_puts_together_bit_by_bit(bits: list[int]) -> None:
    values = floats(bits)
    upper, lower = values.clone(), torch.empty(len(values), dtype=torch.int16)
    split(upper, lower=lower)
    stored = upper.bfloat16()
    again = stored.float()
    join(again, lower)
    numbers = ~values.isnan()
    assert torch.equal(again[numbers].view(torch.int32), values[numbers].view(torch.int32))
    assert bool(again[~numbers].isnan().all())


@given(BITS)
def test_split_rounds_to_the_nearest_bfloat16(bits: list[int]) -> None:
    values = floats(bits)
    values = values[values.isfinite()]
    upper = values.clone()
    split(upper, lower=torch.empty(len(values), dtype=torch.int16))
    assert torch.equal(upper.bfloat16().float().view(torch.int32), upper.view(torch.int32))
    nearest = values.bfloat16().double()
    finite = nearest.isfinite()
    ours, torchs = (upper.double() - values.double()).abs(), (nearest - values.double()).abs()
    assert torch.equal(ours[finite], torchs[finite])


@given(BITS, st.integers(0, 1000))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(bits: list[int], seed: int) -> None:
    values = floats(bits)
    rounded = values.clone()
    round_stochastically(rounded, generator(seed))
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # of smaller magnitude
    above = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    numbers = ~values.isnan()
    assert bool(((rounded == below) | (rounded == above))[numbers].all())
    assert bool(rounded[~numbers].isnan().all()), "a NaN never becomes a number"
    exact = numbers & (values == below)
    assert torch.equal(rounded[exact], values[exact])


@pytest.mark.parametrize("value", [1.0 + 2.0**-9, 1.0 + 2.0**-12, -3.0 - 2.0**-8, 1e-30 * 1.001, 100.3])
def test_the_expected_value_of_stochastic_rounding_is_the_number_itself(value: float) -> None:
    count = 400_000
    values = torch.full((count,), value)
    exact = float(values[0].double())
    round_stochastically(values, generator(3))
    low, high = values.min().double().item(), values.max().double().item()
    share = (exact - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / count) ** 0.5
    assert abs(values.double().mean().item() - exact) < 5 * deviation


def test_draws_of_neighbouring_weights_are_not_correlated() -> None:
    values = torch.full((200_000,), 1.0 + 2.0**-8)
    round_stochastically(values, generator(5))
    up = (values > 1.0).double() - 0.5
    for distance in (1, 2, 3, 4, 5):
        assert abs((up[distance:] * up[:-distance]).mean().item()) < 5 * 0.25 / 200_000**0.5


def test_one_seed_gives_the_same_roundings_and_the_programs_generator_stands_still() -> None:
    before = torch.get_rng_state()
    first, second = torch.linspace(-3, 3, 1001), torch.linspace(-3, 3, 1001)
    round_stochastically(first, generator(7))
    round_stochastically(second, generator(7))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
