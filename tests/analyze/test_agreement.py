import math

import pytest
import torch
from torch import nn

from qtrain.analyze.agreement import agreement, standard_error


class Logits(nn.Module):
    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, index):
        return self.rows[index]


def test_by_hand():
    exact = Logits([0.0, math.log(3)], [0.0, 0.0])  # 1/4, 3/4; 1/2, 1/2
    other = Logits([math.log(3), 0.0], [0.0, 0.0])  # 3/4, 1/4; 1/2, 1/2
    first = 0.25 * math.log(1 / 3) + 0.75 * math.log(3)
    inputs = torch.tensor([[0, 1]] * 9 + [[1, 1]])  # more than are taken at once
    found = agreement(exact, other, (inputs,))
    means = torch.tensor([first / 2] * 9 + [0.0]).double()
    assert found["kl"] == pytest.approx(float(means.mean()), rel=1e-5)
    expected = float(means.std(correction=1)) / 10**0.5
    assert found["kl_standard_error"] == pytest.approx(expected, rel=1e-4)
    assert found["count"] == 20 and found["top1"] == 11 / 20
    assert agreement(exact, exact, (inputs,))["kl"] == 0


def test_one_place_an_example():
    exact, other = Logits([0.0, 1.0], [2.0, 0.0]), Logits([0.0, 2.0], [0.0, 1.0])
    found = agreement(exact, other, (torch.tensor([0, 1]),))
    p, q = exact.rows.log_softmax(-1), other.rows.log_softmax(-1)
    each = (p.exp() * (p - q)).sum(1)
    assert found["kl"] == pytest.approx(float(each.mean()))
    assert found["kl_standard_error"] == pytest.approx(
        float((each[0] - each[1]).abs() / 2)
    )
    assert found["top1"] == 0.5 and found["count"] == 2


def test_a_single_value_has_no_error():
    assert standard_error(torch.tensor([3.0])) == 0
