"""LoRA and QLoRA: small adapters are trained beside Linear layers that stay as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain.backend.packed.compact import PackedEmbedding, PackedLinear
from qtrain.backend.packed.embeddings import tied_heads
from qtrain.backend.packed.formats import PackedFormat
from qtrain.backend.packed.lora import LoRALinear
from qtrain.common.validate import (
    MANY,
    WIDE,
    boolean,
    number,
    refuse,
    shown,
    text,
    whole,
)
from qtrain.functional.spec import CodebookSpec, QuantSpec
from qtrain.quant.adapters import FILE, adapter_state, load_adapters
from qtrain.quant.weight_only import WeightOnly
from qtrain.simulate.simulation import Simulation


@dataclass(frozen=True)
class Merged:
    """A layer with the adapter in its weight, which is stored anew in its base's format."""

    form: PackedFormat | None

    def put(self, model: nn.Module, name: str) -> None:
        """Puts it in the place of the layer with an adapter, in place."""
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, layer.merged())
        if self.form is not None:
            # With the adapter it is the embedding's no longer.
            replace(self.form, weight_of=None).put(model, name)


class LoRA(WeightOnly):
    """Stores weights as `WeightOnly` does, freezes all of them, and trains adapters.

    Args:
        r: the adapters' rank.
        alpha: an adapter is scaled by alpha / r.
        dropout: of the adapters' inputs, in [0, 1).
        targets: patterns of the Linear layers that get one. A head that is tied to an
            embedding is meant by its full name alone.
        merge: add the adapters to the weights in the end, and store these anew.
        adapters: a file of adapters, used as they are instead of a training; or None.
        epochs, optimizer, scheduler, convert_every: as for QAT.
        weight, embedding, head, layers: the base, as for `WeightOnly`; weight None:
            float.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        r: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
        merge: bool,
        adapters: str | None,
        epochs: int,
        optimizer: Any,
        scheduler: Any,
        convert_every: int,
        weight: QuantSpec | CodebookSpec | None = None,
        **base: Any,
    ) -> None:
        problems = whole("epochs", epochs, 1, MANY)
        problems += whole(
            "convert_every", convert_every, 0, MANY if problems else epochs
        )
        problems += whole("r", r, 1, WIDE) + number("alpha", alpha, above=0)
        problems += number("dropout", dropout, least=0, below=1)
        problems += boolean("merge", merge) + text("adapters", adapters, null=True)
        if not (isinstance(targets, list | tuple) and targets) or not all(
            isinstance(pattern, str) for pattern in targets
        ):
            problems.append(
                f"targets={shown(targets)}: must be a list of patterns, such as ['*']"
            )
        try:
            super().__init__(weight=weight, **base)
        except ValueError as err:
            problems.append(str(err))
        else:
            problems += [
                f"layers.{pattern}=llm_int8: rounds its inputs, which has no gradient; "
                "use float, fp16, weight_only or nf4"
                for pattern, form in self.layers.items()
                if form is not None and form.method == "llm_int8"
            ]
        refuse(problems)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.targets, self.merge = tuple(targets), merge
        self.adapters, self.trains = adapters, adapters is None
        self.epochs, self.convert_every = epochs, convert_every
        self.optimizer, self.scheduler = optimizer, scheduler

    # A float model of full size, and no other figures: once, at the end, will do.
    shows_fake = False

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        simulation = super().prepare(model, example)
        forms: dict[str, Any] = dict(simulation.others)
        model = simulation.model
        shapes = self._shapes(model)
        simulation.others = {}
        for name, form in forms.items():
            form.put(model, name)
        model.requires_grad_(False)
        # The run's seed, whatever has been drawn since: no cache shall change it.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        for name, shape in shapes.items():
            layer: Any = model.get_submodule(name)
            adapted = LoRALinear(
                layer.weight,
                layer.bias,
                shape,
                r=self.r,
                alpha=self.alpha,
                dropout=self.dropout,
                generator=generator,
            )
            model.set_submodule(name, adapted)
            if self.merge:
                simulation.others[name] = Merged(forms.get(name))
        return simulation.eval()

    def _shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Returns {Linear layer that gets an adapter: (N, K)}."""
        found = model.named_modules()
        linears = {name: m for name, m in found if type(m) is nn.Linear}
        tied = tied_heads(model)
        chosen: dict[str, tuple[int, int]] = {}
        for pattern in self.targets:
            names = [
                name
                for name in linears
                if name == pattern
                or name not in tied
                and (fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"))
            ]
            if not names:
                raise ValueError(
                    f"quant.targets={shown(pattern)}: matches no Linear layer; "
                    f"there are {', '.join(linears) or 'none'}"
                )
            chosen |= {
                n: (linears[n].out_features, linears[n].in_features) for n in names
            }
        for name, shape in chosen.items():
            if self.r > min(shape):
                raise ValueError(
                    f"quant.r={self.r}: layer {name} is {shape[0]} x {shape[1]}, which "
                    f"has no larger rank than {min(shape)}; use a smaller r, or leave "
                    "it out of quant.targets"
                )
        return chosen

    def start(self, simulation: Simulation) -> None:
        if self.adapters is not None:
            load_adapters(
                simulation.model,
                Path(self.adapters).expanduser(),
                is_rehearsal=simulation.is_rehearsal,
            )

    def files(self, simulation: Simulation) -> dict[str, Any]:
        return {FILE: adapter_state(simulation.model)}

    def convert(self, simulation: Simulation) -> nn.Module:
        return super().convert(simulation).requires_grad_(False)

    def fake(self, simulation: Simulation) -> nn.Module | None:
        """Returns the float model of the same weights: each stored one as a tensor, with its
        adapter in it.
        """
        model = self.convert(simulation)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoRALinear):
                model.set_submodule(name, layer.merged())
            elif isinstance(layer, PackedLinear | PackedEmbedding):
                model.set_submodule(name, layer.to_float())
        return model

    def reference(self, simulation: Simulation) -> nn.Module | None:
        return None
