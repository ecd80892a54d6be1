"""AWQ: weights that large inputs meet are rounded more finely, for their
columns are scaled up.

J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv:2306.00978, equations 4 and 5; and
its search for narrower ranges. Magnitudes of inputs are root mean
squares here, so that the layer's Hessian is all that is kept of the
calibration data.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.common.copying import by_place, cloned
from qtrain.common.validate import boolean, refuse
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.clip import RATIOS, clipped, unshrunk
from qtrain.transform.rounding import Rounding, better_rows, row_losses
from qtrain.transform.target import Choice, PackedTarget

log = logging.getLogger(__name__)

EXPONENTS = tuple(k / 20 for k in range(20))  # the first leaves the weight as it is
SAME = 1e-4  # relative: scaling by 2 is exact, but for sums in another order


class AWQ(Rounding):
    """Scales columns where a norm feeds the layer, and takes it back
    there; then narrows ranges.

    Args:
        scales: whether columns are scaled.
        clip: whether ranges are narrowed.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    name = "awq"

    def __init__(self, *, scales: bool = True, clip: bool = True) -> None:
        super().__init__()
        refuse(boolean("scales", scales) + boolean("clip", clip))
        self.scales, self.clip = scales, clip
        self._norms: dict[str, tuple[Any, list[Any]]] = {}

    def begin(self, simulation: Simulation, batches: Batches) -> None:
        self._norms = {}
        if self.scales:
            self._norms = norms_before(simulation.model, next(iter(batches)))

    def choose(self, target: Any, hessian: Tensor) -> Choice:
        nearest: Choice = target.rounded()
        # Of one scale rows cannot choose
        if not self.clip or target.scale.numel() == 1:
            return nearest
        # Group by group all may gain, and the row still lose.
        narrower = target.rounded(clipped(target, hessian, RATIOS))
        narrower = unshrunk(target, narrower, hessian)
        return better_rows(target.weight, nearest, narrower, hessian)

    def improve_layer(
        self, name: str, target: Any, hessian: Tensor
    ) -> dict[str, Any]:
        factor = None
        if name in self._norms and isinstance(target, PackedTarget):
            factor = best_factor(target, hessian[0])
            target.take(target.weight * factor)
            hessian = hessian / torch.outer(factor, factor).double()
        return self.choose(target, hessian)._asdict() | {"factor": factor}

    def error(
        self, target: Any, weight: Tensor, found: dict[str, Any], hessian: Tensor
    ) -> float:
        choice, factor = _parts(found)
        restored = choice.dequantized()
        restored = restored if factor is None else restored / factor
        return float(row_losses(weight - restored, hessian).sum())

    def finish(self, name: str, target: Any, found: dict[str, Any]) -> None:
        choice, factor = _parts(found)
        if factor is not None:
            norm, layers = self._norms[name]
            rescale(norm, layers, factor)
            # The other layers that it feeds are scaled by now.
            self._norms = {
                n: fed for n, fed in self._norms.items() if fed[0] is not norm
            }
        target.keep(choice)


def _parts(found: dict[str, Any]) -> tuple[Choice, Tensor | None]:
    return Choice(found["integers"], found["scale"], found["zero_point"]), found[
        "factor"
    ]


def best_factor(target: PackedTarget, hessian: Tensor) -> Tensor:
    """Returns (K,): the factors of columns, m^r of least loss, m the
    magnitude of inputs.

    Args:
        hessian: float64 (K, K).
    """
    weight = target.weight
    magnitude = hessian.diagonal().sqrt().float()
    magnitude = magnitude.clamp(
        min=float(magnitude.max()) * 1e-4 + torch.finfo().tiny
    )
    best, least = torch.ones_like(magnitude), torch.inf
    for exponent in EXPONENTS:
        factor = magnitude**exponent
        factor = factor / (factor.max() * factor.min()).sqrt()
        target.take(weight * factor)
        error = weight - target.rounded().dequantized() / factor
        found = float(row_losses(error, hessian[None]).sum())
        if found < least:
            best, least = factor, found
    target.take(weight)
    return best


def rescale(norm: Any, layers: list[Any], factor: Tensor) -> None:
    """Divides a norm's output by `factor` (K,), and multiplies the layers'
    columns, in place.
    """
    for name in ("weight", "bias"):
        old = getattr(norm, name, None)
        if old is not None:
            setattr(
                norm, name, nn.Parameter(old.detach() / factor, requires_grad=False)
            )
    for layer in layers:
        scaled = layer.weight.detach() * factor
        layer.weight = nn.Parameter(scaled, requires_grad=False)


def norms_before(
    model: nn.Module, batch: tuple[Any, ...]
) -> dict[str, tuple[Any, list[Any]]]:
    """Returns {Linear layer: (the norm whose output is its input, all
    Linear layers it feeds)}.

    Only where the norms feed nothing else: scaled by 2 and back, the
    model computes the same.
    """
    outputs: list[tuple[Any, Tensor]] = []
    found: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.LayerNorm | nn.RMSNorm)
            and module.weight is not None
        ):
            keep = lambda norm, _, output: outputs.append((norm, output))  # noqa: E731
            handles.append(module.register_forward_hook(keep))
        elif type(module) is nn.Linear:

            def look(_: Any, args: Any, named: Any, name: str = name) -> None:
                for norm, output in outputs:
                    if by_place(args, named)[0] is output:
                        found[name] = norm

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    before = model(*cloned(batch))
    for handle in handles:
        handle.remove()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    layers = {name: model.get_submodule(name) for name in found}
    tied = {
        n for n, layer in layers.items() if any(layer.weight is t for t in tables)
    }
    norms = {
        norm: [layers[n] for n in layers if found[n] is norm]
        for norm in {found[n] for n in tied ^ set(layers)} - {found[n] for n in tied}
    }
    for factor in (2.0, 0.5):
        for norm, fed in norms.items():
            rescale(norm, fed, torch.full_like(norm.weight, factor))
        if factor == 2.0:
            after = model(*cloned(batch))
    if (
        not isinstance(before, Tensor)
        or (after - before).norm() > SAME * before.norm()
    ):
        log.info(
            "awq: outputs of norms are used elsewhere too, so columns are not scaled"
        )
        return {}
    return {
        name: (norm, norms[norm]) for name, norm in found.items() if norm in norms
    }
