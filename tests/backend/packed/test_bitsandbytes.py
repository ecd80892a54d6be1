"""LLM.int8() beside bitsandbytes' own, by the paper's authors (extra `peers`)."""

import logging

import pytest
import torch
from torch import nn

from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec

bitsandbytes = pytest.importorskip("bitsandbytes")

OUTLIERS = [3, 77, 200]


def relative(difference, reference):
    return (difference.double().norm() / reference.double().norm()).item()


@pytest.fixture
def peers():
    """peers(threshold): a float layer, ours, theirs, of the same weights; theirs logs a warning."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    exact = nn.Linear(256, 384).eval()
    # Theirs rounds weights to float16 before anything else.
    exact.weight.data = exact.weight.data.half().float()
    theirs = bitsandbytes.nn.Linear8bitLt(
        256, 384, has_fp16_weights=False, threshold=6.0
    )
    theirs.load_state_dict(exact.state_dict())
    theirs = theirs.to("cpu").eval()
    spec = QuantSpec(bits=8, symmetric=True, granularity="per_channel")

    def make(threshold=6.0):
        return (
            exact,
            LLMInt8Linear(IntegerWeight(exact.weight, spec), exact.bias, threshold),
            theirs,
        )

    return make


def inputs(rows, outliers):
    """Numbers of float16 within 5, and columns of +-40.

    Theirs leaves single outliers out of a row's scale, ours the whole column, which is the same
    where all of the column is outlying.
    """
    x = torch.randn(rows, 256).clamp(-5, 5).half().float()
    x[:, outliers] = x[:, outliers].sign() * 40
    return x


@pytest.mark.parametrize("outliers", [[], OUTLIERS], ids=["regular", "outliers"])
@pytest.mark.parametrize("rows", [1, 16, 128])
@torch.no_grad()
def test_both_agree_to_the_rounding_of_bitsandbytes_output(rows, outliers, peers):
    exact, ours, theirs = peers()
    x = inputs(rows, outliers)
    difference = relative(ours(x) - theirs(x), exact(x))
    # Theirs has the 8 significant bits of bfloat16 on a CPU
    assert difference < 2**-9
    # Not merely two approximations of the same thing.
    assert difference < relative(ours(x) - exact(x), exact(x)) / 2


@torch.no_grad()
def test_without_a_threshold_they_would_not_agree(peers):
    exact, ours, theirs = peers(threshold=None)
    x = inputs(16, OUTLIERS)
    assert relative(ours(x) - theirs(x), exact(x)) > 2**-7


@torch.no_grad()
def test_both_hold_the_same_integers_but_for_ties(peers):
    _, ours, theirs = peers()
    theirs(inputs(1, []))  # makes them
    expected = theirs.weight.CB if theirs.state.CB is None else theirs.state.CB
    difference = (ours.weight.int_repr().int() - expected.int()).abs()
    assert difference.max() <= 1 and difference.sum() <= 1e-4 * difference.numel()
