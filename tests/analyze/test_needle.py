"""Needles in a text: what models that look back, and those that do not, gain from them."""

import math

import pytest
import torch

from qtrain.analyze.needle import LENGTH, needle_gains

VOCAB = 200


def copying(reach):
    """Expects what followed the same token within so many tokens; else all tokens alike."""

    def call(idx):
        logits = torch.zeros(*idx.shape, VOCAB)
        for row, tokens in enumerate(idx.tolist()):
            for place, token in enumerate(tokens):
                before = range(place - 1, max(-1, place - reach - 1), -1)
                last = next((i for i in before if tokens[i] == token), None)
                if last is not None:
                    logits[row, place, tokens[last + 1]] = 5.0
        return logits

    return call


@pytest.fixture
def text():
    """Of token 0 alone, but for one of each other at its end, of which needles are made."""
    return torch.cat([torch.zeros(400, dtype=torch.int64), torch.arange(VOCAB)])


def test_who_looks_back_far_enough_gains_and_who_does_not_gains_nothing(text):
    near, far = LENGTH, 64 - LENGTH
    gains = needle_gains(copying(30), text, 64, [near, far], count=8)
    # Of log V nats so many remain where the right one of V has 5 more than others
    saved = math.log(VOCAB) - math.log(1 + (VOCAB - 1) * math.exp(-5))
    # A token that a needle has twice leads astray
    assert gains[near][0] == pytest.approx(saved, rel=0.1) and gains[near][1] > 0
    assert gains[far] == (0.0, 0.0)
    gain, error = needle_gains(copying(64), text, 64, [far], count=8)[far]
    assert gain == pytest.approx(saved, rel=0.1) and 0 < error < 0.1 * gain


def test_a_model_that_ignores_the_context_gains_nothing(text):
    gains = needle_gains(lambda idx: torch.zeros(*idx.shape, VOCAB), text, 64, [20])
    assert gains == {20: (0.0, 0.0)}


def test_what_is_too_near_or_too_far_is_refused(text):
    with pytest.raises(
        ValueError, match=r"distance=7: must be 8\.\.56.*\n.*=57: must"
    ):
        needle_gains(copying(9), text, 64, [7, 20, 57])
    with pytest.raises(ValueError, match="text: has 30 tokens"):
        needle_gains(copying(9), text[:30], 64, [20])
