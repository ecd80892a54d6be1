"""The proof that a captured model is the model it was made of."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qtrain.common.copying import cloned, copy_model

# Relative, where attention was opened or batch-norm folded. What differs by more in
# float32 is computed again in float64, where rounding costs 1e-12.
LIMIT = 1e-5
# Of models that cannot be float64: batch-norms that took their statistics of two
# samples have cost 4e-5.
ROUNDING = 1e-4

SAME_SHAPE = ("the example", "random input")


def prove(
    model: nn.Module,
    captured: nn.Module,
    inputs: tuple[Any, ...],
    *,
    exact: bool,
    training: bool,
) -> float:
    """Runs both on the example, on random tensors of its shapes, and on fewer and more samples.

    Args:
        exact: whether all bits must be the same.
        training: in which mode.

    Returns:
        the largest relative difference.

    Raises:
        ValueError: they differ.
        Frozen: the captured model takes no other number of samples.
    """
    mode, largest = "train" if training else "eval", 0.0
    cases = [*zip(SAME_SHAPE, (inputs, _random(inputs)), strict=True)]
    for kind, arguments in cases + _other_batches(inputs):
        try:
            first = _run(copy_model(model).train(training), arguments)
        except Exception:
            if kind in SAME_SHAPE:
                raise
            # The user's model need not take so many samples.
            continue
        second = _run(copy_model(captured).train(training), arguments)
        error, limit = difference(first, second), 0.0 if exact else LIMIT
        if not exact and error > LIMIT:
            one, other = (copy_model(m).train(training) for m in (model, captured))
            error, limit = _precisely(one, other, arguments, error)
        largest = max(largest, error)
        if error > limit:
            raise ValueError(
                f"model: captured, in {mode} mode, it computes something else than "
                f"{type(model).__name__} on {kind}: {error:.1e} relative. Use "
                "quant.capture.mode=bracket, "
                "or name the module at fault in quant.capture.leaves"
            )
    return largest


def difference(first: Any, second: Any) -> float:
    """Returns the largest relative difference of two outputs' tensors; infinity: others at all."""
    (ours, one) = tree_flatten(_parts(first))
    (theirs, other) = tree_flatten(_parts(second))
    if one != other:
        return float("inf")
    return max(map(_apart, ours, theirs), default=0.0)


def _parts(output: Any) -> Any:
    """Returns a dataclass as a mapping, and all else as it is."""
    if not is_dataclass(output):
        return output
    return {field.name: getattr(output, field.name) for field in fields(output)}


def _apart(first: Any, second: Any) -> float:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return 0.0 if first == second else float("inf")
    if first.shape != second.shape or first.dtype != second.dtype:
        return float("inf")
    ours, theirs = first.double(), second.double()
    known = ours.isfinite()
    if not torch.equal(known, theirs.isfinite()):
        return float("inf")
    if not torch.equal(ours[~known].nan_to_num(), theirs[~known].nan_to_num()):
        return float("inf")
    # A norm with NaN in it would compare with nothing
    ours, theirs = ours[known], theirs[known]
    return float((ours - theirs).norm() / ours.norm().clamp(min=1e-12))


def _precisely(
    model: nn.Module, captured: nn.Module, inputs: tuple[Any, ...], error: float
) -> tuple[float, float]:
    """Returns the difference in float64, and how large it may be.

    Args:
        error: that in float32, which counts where a model cannot be float64.
    """
    wide = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    try:
        outputs = [_run(m.double(), wide) for m in (model, captured)]
    except RuntimeError:
        # It makes tensors of float32 by itself.
        return error, ROUNDING
    return difference(*outputs), LIMIT


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout draws the same in both
        return model(*cloned(inputs))


def _random(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns other floats of the same shapes; what indexes stays in its order, turned round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tuple(map(_other, inputs))


def _other_batches(inputs: tuple[Any, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    """Returns the example with one sample, and with one more, under a name each."""
    size = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), 0)
    counts = {1, size + 1} - {size} if size else set()
    return [
        (f"{count} samples", tuple(_resized(x, size, count) for x in inputs))
        for count in sorted(counts)
    ]


def _resized(x: Any, size: int, count: int) -> Any:
    if not isinstance(x, Tensor) or not x.dim() or len(x) != size:
        return x
    return x[torch.arange(count, device=x.device) % size]


def _other(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.numel():
        return x
    if x.is_floating_point():
        return torch.randn_like(x)
    return x.flatten().flip(0).reshape(x.shape)
