"""GPTQ: columns are rounded one by one, and those to come make up for the
error of each.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", arXiv:2210.17323, algorithm 1. The
grid is fixed beforehand, so that the result depends neither on the
order of columns in a group nor on the size of blocks. What it finds is
Babai's nearest plane, back to front (arXiv:2507.18553).

Shapes: a weight is (N, K), a Hessian (K, K), the sum of x x^T over the
layer's inputs x.
"""

import torch
from torch import Tensor

from qtrain.functional.grouping import expand_parameter

BLOCK = 32  # columns after which the others are made up for, all at once


def loss(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns (N,): the summed squared error of each output when the
    weight is off by `error`.

    >>> loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([2.], dtype=torch.float64)
    """
    error = error.double()
    return (error @ hessian.double() * error).sum(1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Returns the Hessian in float64 with a share of its mean diagonal
    added to the diagonal.

    Where no input has been anything but 0 it is the identity, by which
    each weight is rounded.
    """
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    if mean == 0:
        return torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    added = torch.full_like(hessian.diagonal(), float(damping * mean))
    return hessian + added.diag()


def inverse_factor(hessian: Tensor) -> Tensor:
    """Returns the upper U with U^T U = H^-1, by one triangular solve and
    no inverse.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite; more
            damping helps.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    return factor


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = BLOCK,
) -> Tensor:
    """Returns the integers (N, K), int64, of a float weight on a given grid.

    e = (w_i - dq(q(w_i))) / U_ii, then w_j -= e U_ij for j > i:
    equations 2 and 3.

    Args:
        scale, zero_point: the grid, as for `affine.quantize`.
        damping: of the Hessian's mean diagonal, added to its diagonal.
        act_order: begin with the columns of the largest inputs.
        block: columns; what comes out does not depend on it.

    Inputs that know nothing of each other give plain rounding:

    >>> one = torch.tensor([[1.4, 0.6]])
    >>> gptq(one, torch.eye(2), torch.tensor(1.0), torch.tensor(0), -7, 7)
    tensor([[1, 1]])

    Where two inputs are alike, the second weight makes up for the first:

    >>> alike = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    >>> gptq(one - 0.2, alike, torch.tensor(1.0), torch.tensor(0), -7, 7)
    tensor([[1, 1]])
    """
    hessian = damped(hessian, damping)
    count = len(hessian)
    order = torch.arange(count, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])
    # By columns, each in one piece: (K, N).
    left = weight.double().T[order]
    scale = _columns(scale, weight)[order]
    zero_point = _columns(zero_point, weight)[order]
    integers = torch.empty_like(left)
    for start in range(0, count, block):
        end = min(start + block, count)
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            steps = torch.addcdiv(zero_point[i], left[i], scale[i])
            integers[i] = steps.round_().clamp_(quant_min, quant_max)
            value = (integers[i] - zero_point[i]) * scale[i]
            error = torch.sub(left[i], value, out=errors[i - start])
            error.div_(factor[i, i])
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return integers[order.argsort()].T.long().contiguous()


def _columns(parameter: Tensor, weight: Tensor) -> Tensor:
    """Returns a scale or zero point for each weight, (K, N)."""
    return (
        expand_parameter(parameter.double(), weight).expand_as(weight).T.contiguous()
    )
