"""GPTQ as a transform: see `qtrain.functional.gptq`."""

import torch
from torch import Tensor

from qtrain.common.validate import MANY, boolean, number, refuse, whole
from qtrain.functional.gptq import BLOCK, gptq
from qtrain.transform.clip import RATIOS, clipped, unshrunk
from qtrain.transform.rounding import Rounding, better_rows
from qtrain.transform.target import Choice, Target


class GPTQ(Rounding):
    """Rounds weights so that those of a row make up for each other's
    errors.

    A row keeps plain rounding where that is better on the calibration
    data.

    Args:
        damping: share of the Hessian's mean diagonal that is added to
            its diagonal.
        act_order: begin with the columns of the largest inputs.
        clip: let ranges be narrower where that is better on the
            calibration data.
        block: columns after which the others are made up for; of no
            effect on the result.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    name = "gptq"

    def __init__(
        self,
        *,
        damping: float = 0.01,
        act_order: bool = True,
        clip: bool = True,
        block: int = BLOCK,
    ) -> None:
        super().__init__()
        refuse(
            number("damping", damping, above=0, most=1)
            + boolean("act_order", act_order)
            + boolean("clip", clip)
            + whole("block", block, 1, MANY)
        )
        self.damping = damping
        self.act_order = act_order
        self.clip = clip
        self.block = block

    def choose(self, target: Target, hessian: Tensor) -> Choice:
        nearest = target.rounded()
        has_one_scale = target.scale.numel() == 1  # of which rows cannot choose
        clips = self.clip and not has_one_scale
        scale = clipped(target, hessian, RATIOS) if clips else target.scale
        count = len(target.weight)
        start = Choice(nearest.integers, *(_rows(x, count) for x in nearest[1:]))
        scale = _rows(scale, count)
        parts = (
            x.chunk(target.parts) for x in (target.weight, scale, start.zero_point)
        )
        found = [
            gptq(
                weight,
                own,
                own_scale,
                zero_point,
                target.quant_min,
                target.quant_max,
                damping=self.damping,
                act_order=self.act_order,
                block=self.block,
            )
            for weight, own_scale, zero_point, own in zip(
                *parts, hessian, strict=True
            )
        ]
        integers = torch.cat(found).to(start.integers.dtype)
        made = Choice(integers, scale, start.zero_point)
        if not has_one_scale:
            made = unshrunk(target, made, hessian)
        return better_rows(target.weight, start, made, hessian)


def _rows(parameter: Tensor, count: int) -> Tensor:
    """Returns a scale or zero point with so many rows, though all of them
    may share one.
    """
    groups = parameter.shape[-1] if parameter.dim() else 1
    return parameter.reshape(-1, groups).expand(count, groups)
