"""GPTQ against what it is by definition: Babai's nearest plane, and rounding where H is I."""

import itertools

import pytest
import torch

from qtrain.functional.affine import dequantize, symmetric
from qtrain.functional.gptq import gptq, inverse_factor, loss


def problem(rows=6, columns=48, samples=96):
    """A weight, the Hessian of inputs that know of each other, and a grid in groups of 16."""
    weight = torch.randn(rows, columns)
    inputs = torch.randn(samples, columns) @ torch.randn(columns, columns)
    return (
        weight,
        inputs.T.double() @ inputs.double(),
        symmetric(weight, 3, group_size=16),
    )


def babai(weight, hessian, scale):
    """Integers (K,) of one row, unbounded, by the nearest plane: R = chol(H)^T upper, last first.

    The target is R w, the basis R diag(scale): the last coefficient is the nearest plane's.
    """
    factor = torch.linalg.cholesky(hessian).T
    basis, target = factor * scale, factor @ weight
    found = torch.zeros_like(weight)
    for i in reversed(range(len(weight))):
        rest = target[i] - basis[i, i + 1 :] @ found[i + 1 :]
        found[i] = torch.round(rest / basis[i, i])
    return found


def test_it_is_babais_nearest_plane_from_the_last_column_on():
    weight, hessian, grid = problem()
    hessian = hessian + hessian.diagonal().mean() * 0.01 * torch.eye(48)
    flipped, flipped_hessian = weight.flip(1), hessian.flip(0, 1)
    scale = grid.scale.repeat_interleave(16, 1)
    # GPTQ begins with its first column, Babai with the last of the same lattice.
    wide = gptq(
        flipped,
        flipped_hessian,
        scale.flip(1),
        torch.tensor(0),
        -(10**6),
        10**6,
        damping=1e-12,
        act_order=False,
    ).flip(1)
    for row in range(len(weight)):
        expected = babai(weight[row].double(), hessian, scale[row].double())
        assert torch.equal(wide[row].double(), expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_that_know_nothing_of_each_other_give_plain_rounding(act_order):
    weight, _, grid = problem()
    diagonal = torch.rand(48).double().add(0.1).diag()
    found = gptq(
        weight, diagonal, grid.scale, grid.zero_point, -3, 3, act_order=act_order
    )
    assert torch.equal(found, grid.int_repr.long())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 16, 32, 1000])
def test_the_size_of_blocks_changes_nothing(block, act_order):
    weight, hessian, grid = problem()
    settings = weight, hessian, grid.scale, grid.zero_point, -3, 3
    found = gptq(*settings, act_order=act_order, block=block)
    assert torch.equal(found, gptq(*settings, act_order=act_order, block=48))


def test_it_beats_rounding_by_far_and_stays_above_the_best_there_is():
    weight, inputs = 2 * torch.randn(3, 6), torch.randn(12, 6) @ torch.randn(6, 6)
    hessian = inputs.T.double() @ inputs.double()
    scale, zero = torch.tensor(1.0), torch.tensor(0)
    best = torch.full((3,), torch.inf, dtype=torch.float64)
    for integers in itertools.product(range(-4, 4), repeat=6):
        point = torch.tensor(integers).float()
        best = torch.minimum(best, loss(weight - point, hessian))
    found = loss(weight - gptq(weight, hessian, scale, zero, -4, 3), hessian)
    nearest = loss(weight - weight.round().clamp(-4, 3), hessian)
    assert (best <= found * (1 + 1e-9)).all() and found.sum() < 0.7 * nearest.sum()


def test_columns_without_inputs_are_rounded_and_change_nothing_else():
    weight, hessian, grid = problem()
    hessian[:, 7] = hessian[7] = 0
    found = gptq(weight, hessian, grid.scale, grid.zero_point, -3, 3)
    assert torch.equal(found[:, 7], grid.int_repr[:, 7].long())
    others = [i for i in range(48) if i != 7]
    scale = grid.scale.repeat_interleave(16, 1)[:, others]
    # The mean of the diagonal, by which damping goes, is that of fewer columns there.
    alone = gptq(
        weight[:, others],
        hessian[others][:, others],
        scale,
        torch.tensor(0),
        -3,
        3,
        damping=0.01 * 47 / 48,
    )
    assert torch.equal(found[:, others], alone)


def test_the_loss_is_that_of_the_outputs():
    weight, inputs = torch.randn(4, 10), torch.randn(30, 10)
    error = weight - weight.round()
    expected = (inputs.double() @ error.double().T).square().sum(0)
    hessian = inputs.double().T @ inputs.double()
    torch.testing.assert_close(loss(error, hessian), expected)


def test_the_factor_is_that_of_the_inverse():
    _, hessian, _ = problem()
    factor = inverse_factor(hessian)
    torch.testing.assert_close(
        factor.T @ factor @ hessian, torch.eye(48, dtype=torch.float64)
    )
    assert torch.equal(factor, factor.triu())


def test_integers_stay_on_the_grid():
    weight, hessian, grid = problem()
    found = gptq(weight * 3, hessian, grid.scale, grid.zero_point, -3, 3)
    assert found.min() == -3 and found.max() == 3
    assert dequantize(found, grid.scale, grid.zero_point).shape == weight.shape
