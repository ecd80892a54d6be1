"""How many bits weights have, whatever stores them: torch gives 2, 4 and 8 bits a byte each."""

from collections.abc import Iterator

from torch import nn

from qtrain.analyze.measure import weight_bytes
from qtrain.backend import integers
from qtrain.backend.packed.compact import Codes
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.plan import Plan
from qtrain.simulate.sites import QuantWeighted


def mean_bits(quantized: nn.Module, plan: Plan) -> float | None:
    """Returns the bits of a quantized weight, the mean over all of them; None where there is none.

    Args:
        quantized: a converted model, or a simulation's.
        plan: what its layers became.
    """
    found = list(_weights(quantized, plan))
    total = sum(count for count, _, _ in found)
    return sum(count * bits for count, bits, _ in found) / total if total else None


def bytes_at_bits(
    quantized: nn.Module, plan: Plan, float_model: nn.Module, *, simulated: bool
) -> int:
    """Returns the bytes that the model's tensors would take if each weight were stored in its bits.

    Args:
        quantized, plan: as for `mean_bits`.
        float_model: what a simulation is measured by, its scales left out: a few
            bytes a channel.
        simulated: whether `quantized` is a simulation's.
    """
    spared = sum(
        count * (stored - bits) for count, bits, stored in _weights(quantized, plan)
    )
    return weight_bytes(float_model if simulated else quantized) - spared // 8


def _weights(model: nn.Module, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Yields (numbers, bits, stored bits of each) of each quantized weight, shared ones once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        layer = plan.get(name)
        planned = (
            layer.weight
            if layer is not None and isinstance(layer.weight, QuantSpec)
            else None
        )
        if isinstance(module, QuantWeighted):
            if planned is not None:
                yield module.weight.numel(), planned.bits, 32
            continue
        weight = integers.quantized_weight(module)
        if weight is None or id(weight) in seen:
            continue
        if isinstance(weight, Codes):
            seen.add(id(weight))
            yield weight.numel(), weight.bits, weight.bits
        else:
            yield weight.numel(), planned.bits if planned is not None else 8, 8
