from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import pytest
import torch

from qtrain.functional.spec import GRANULARITIES, QuantSpec, int_range


def observer(**qargs): ...


@pytest.mark.parametrize("bits", range(2, 33))
def test_int_range_holds_every_pattern_of_bits(bits):
    for signed in (False, True):
        low, high = int_range(bits, signed)
        assert high - low + 1 == 2**bits
    assert low == -high - 1  # two's complement
    assert int_range(bits, False)[0] == 0
    assert int_range(bits, True, restricted=True) == (-high, high)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str
)
def test_int_range_is_that_of_torchs_dtype(dtype):
    info = torch.iinfo(dtype)
    assert int_range(info.bits, dtype.is_signed) == (info.min, info.max)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_reduce_range_halves_the_integers_of_8_bits_and_no_others(bits, signed):
    low, high = QuantSpec(bits=bits).quant_range(signed)
    reduced_low, reduced_high = QuantSpec(bits=bits, reduce_range=True).quant_range(
        signed
    )
    assert (
        (high - low + 1)
        == 2**bits
        == (reduced_high - reduced_low + 1) * (2 if bits == 8 else 1)
    )
    assert low <= reduced_low and reduced_high <= high
    assert QuantSpec(bits=bits, reduce_range=False).quant_range(signed) == (low, high)


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_range_is_symmetric_about_0(bits):
    low, high = QuantSpec(bits=bits, narrow_range=True).quant_range(signed=True)
    assert low == -high and QuantSpec(bits=bits).quant_range(signed=True) == (
        low - 1,
        high,
    )
    assert QuantSpec(bits=bits, narrow_range=True).quant_range(signed=False) == (
        0,
        2**bits - 1,
    )


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("bits", 1, "from 2 to 8"),
        ("bits", 9, "from 2 to 8"),
        ("bits", 4.0, "whole number"),
        ("bits", "8", "whole number"),
        ("bits", True, "whole number"),
        ("bits", None, "whole number"),
        ("symmetric", "yes", "true, false and auto"),
        ("symmetric", None, "true, false and auto"),
        ("reduce_range", "no", "true, false and auto"),
        ("narrow_range", 127, "true, false and auto"),
        ("granularity", "per_row", "per_tensor, per_channel, per_group and auto"),
        ("granularity", None, "per_tensor, per_channel, per_group and auto"),
        ("observer", "minmax", "callable"),
    ],
)
def test_each_field_is_refused_with_its_value_and_what_is_allowed(
    field, value, allowed
):
    with pytest.raises(ValueError) as err:
        QuantSpec(**{field: value})
    (line,) = str(err.value).splitlines()
    assert line.startswith(f"{field}={value}: ") and allowed in line


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "32"], ids=repr)
def test_group_size_must_be_a_positive_whole_number(size):
    assert QuantSpec(granularity="per_group", group_size=1).group_size == 1
    with pytest.raises(
        ValueError, match=f"group_size={size}: must be a whole number from 1 to"
    ):
        QuantSpec(granularity="per_group", group_size=size)


def test_a_size_of_groups_means_groups():
    assert QuantSpec(group_size=32).granularity == "per_group"
    with pytest.raises(ValueError, match="group_size=32: goes with granularity="):
        QuantSpec(granularity="per_channel", group_size=32)


def test_groups_need_a_size():
    with pytest.raises(
        ValueError, match="group_size=None: goes with granularity=per_group"
    ):
        QuantSpec(granularity="per_group")


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValueError) as err:
        QuantSpec(bits=9, symmetric=3, granularity="all", reduce_range=2, observer=1)
    keys = [line.split("=")[0] for line in str(err.value).splitlines()]
    assert keys == ["bits", "symmetric", "reduce_range", "granularity", "observer"]


def test_every_legal_value_is_taken():
    for bits in range(2, 9):
        for granularity in ("auto", *GRANULARITIES):
            size = 4 if granularity == "per_group" else None
            for flag in (True, False, "auto"):
                spec = QuantSpec(
                    bits=bits,
                    granularity=granularity,
                    group_size=size,
                    symmetric=flag,
                    reduce_range=flag,
                )
                assert (spec.bits, spec.granularity, spec.symmetric) == (
                    bits,
                    granularity,
                    flag,
                )


def test_replacing_a_field_checks_it_again():
    with pytest.raises(ValueError, match="bits=9"):
        replace(QuantSpec(), bits=9)


def test_spec_is_frozen_and_takes_keywords_only():
    with pytest.raises(FrozenInstanceError):
        QuantSpec().bits = 4
    with pytest.raises(TypeError):
        QuantSpec(8)


@pytest.mark.parametrize(
    "factory", [observer, partial(observer, bins=3)], ids=["function", "partial"]
)
def test_description_has_every_field_as_a_plain_value(factory):
    spec = QuantSpec(
        bits=4,
        symmetric=False,
        granularity="per_group",
        group_size=32,
        observer=factory,
        reduce_range=True,
    )
    description = spec.describe()
    assert set(description) == {field.name for field in fields(QuantSpec)}
    assert description == {
        "bits": 4,
        "symmetric": False,
        "granularity": "per_group",
        "group_size": 32,
        "reduce_range": True,
        "narrow_range": "auto",
        "observer": "observer",
    }
    assert QuantSpec().describe()["observer"] is None
