import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from qtrain.train.scheduler import constant, cosine


def sgd(lr=0.4):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(make_schedule, num_steps):
    """The learning rates that the optimizer steps are made with."""
    optimizer, seen = sgd(), []
    schedule = make_schedule(optimizer)
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_constant_costs_nothing():
    optimizer = sgd()
    assert constant(optimizer, 100) is None
    assert optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("num_steps", [1, 7, 100])
@pytest.mark.parametrize(
    "warmup, final", [(0, 0), (0.05, 0), (0.3, 0.1), (1, 0.5), (0.5, 1)]
)
def test_cosine_by_its_formula(num_steps, warmup, final):
    num_warmup = round(warmup * num_steps)
    rising = [0.4 * k / num_warmup for k in range(1, num_warmup + 1)]
    falling = [
        0.4
        * (
            final
            + (1 - final) * math.cos(math.pi / 2 * k / (num_steps - num_warmup)) ** 2
        )
        for k in range(num_steps - num_warmup)
    ]
    got = rates(
        lambda optimizer: cosine(optimizer, num_steps, warmup=warmup, final=final),
        num_steps,
    )
    assert got == pytest.approx(rising + falling, abs=1e-12)


def test_cosine_is_what_torch_makes_of_its_parts():
    def by_torch(optimizer):
        rise = LinearLR(optimizer, start_factor=1 / 5, end_factor=1, total_iters=4)
        fall = CosineAnnealingLR(optimizer, T_max=15, eta_min=0.04)
        return SequentialLR(optimizer, [rise, fall], milestones=[5])

    with warnings.catch_warnings():
        # SequentialLR uses its parts in ways that they warn of
        warnings.simplefilter("ignore")
        expected = rates(by_torch, 20)
    assert rates(
        lambda o: cosine(o, 20, warmup=0.25, final=0.1), 20
    ) == pytest.approx(expected, abs=1e-12)


def test_cosine_serves_every_parameter_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [
            {"params": [parameters[0]], "lr": 1.0},
            {"params": [parameters[1]], "lr": 2.0},
        ]
    )
    schedule = cosine(optimizer, 4, warmup=0, final=0)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.5, 1.0]
    )


def test_no_steps_at_all():
    cosine(sgd(), 0, warmup=0.05, final=0)


@pytest.mark.parametrize(
    "wrong", [{"warmup": -0.1}, {"warmup": 1.1}, {"final": -1}, {"final": 2}], ids=str
)
def test_shares_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(
        ValueError, match=f"^{name}={value}: must be a number from 0 to 1$"
    ):
        cosine(sgd(), 10, **{"warmup": 0.1, "final": 0.1} | wrong)
