"""The simulation: a float model whose layers behave as their integers will."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtrain.common.copying import by_place, cloned, copy_model
from qtrain.simulate.kept import Kept
from qtrain.simulate.origins import Home
from qtrain.simulate.plan import Plan
from qtrain.simulate.points import leave_float, output_points, sites, weight_points
from qtrain.simulate.regions import running_in_float
from qtrain.simulate.sites import QuantModule, QuantWeighted

Batches = Iterable[tuple[Any, ...]]  # the arguments of one forward pass each


class Replacement(Protocol):
    """What becomes of a float layer in the end, whatever the backend makes of the sites."""

    def put(self, model: nn.Module, name: str) -> None:
        """Puts it in the place of layer `name`, in place."""


class Lowering(Protocol):
    """What makes integers of a simulation: a backend, of which nothing else is known here."""

    def lower(self, simulation: "Simulation") -> nn.Module:
        """Returns the model that runs on integers, on the CPU, in eval mode."""


class Simulation(nn.Module):
    """A model of sites, the plan that they follow, and the switches of their fake quantization.

    It is called as the model is, in eval mode for PTQ and in train mode for QAT.

    Args:
        model: with sites, or without any: then it stands for itself.
        plan: {name of a site in `model`: what it becomes}.
        others: {name of a float layer in `model`: what takes its place in the end},
            in that order.

    Attributes:
        backend: what lowers it, or None.
        clips_at_type: whether its kernels clip at the ends of uint8, though a scale
            be made for 0..127.
        example: arguments of forward, two samples, or none.
        improvements: what transforms have done to it, for reports.
        capture: how the float model was made ready to be simulated, for reports.
        home: brings its weights back to the user's class, or None: it is the user's.
        is_rehearsal: whether transforms are only tried, before a run: on a layer of each kind.
        kept: where transforms keep the layers that they have finished.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        others: Mapping[str, Replacement] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan or {}
        self.others = dict(others or {})
        self.backend: Lowering | None = None
        self._observes = False
        self.clips_at_type = False
        self.improvements: list[dict[str, Any]] = []
        self.capture: dict[str, Any] = {}
        self.home: Home | None = None
        self.is_rehearsal = False
        self.kept = Kept()
        self.example: tuple[Any, ...] = ()
        self._knows_regions = False
        # Hidden from nn.Module: it is no part of the state
        self._twin: list[nn.Module] = []

    def train(self, mode: bool = True) -> "Simulation":
        """Sets the mode; in eval mode no output's range moves: validation data must not move it."""
        super().train(mode)
        for point in output_points(self.model).values():
            point.observe(self._observes and mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._knows_regions:
            self._leave_float(args)
        return self.model(*args, **kwargs)

    def set_mode(
        self, *, observing: bool, quantizing: bool, only: str | None = None
    ) -> None:
        """Switches all fake quantizations, in place.

        Args:
            observing: whether the ranges of outputs are observed.
            quantizing: whether they and the weights are quantized.
            only: the one site that is.
        """
        for name, site in sites(self.model).items():
            for point in (site.weight_q, site.output_q):
                if point is not None:
                    point.quantizing = quantizing and only in (None, name)
        for point in output_points(self.model).values():
            point.observe(observing)
        self._observes = observing

    @contextmanager
    def mode(self, **how: Any) -> Iterator[nn.Module]:
        """Yields the model, switched as by `set_mode` until the block is left."""
        points = [
            *weight_points(self.model).values(),
            *output_points(self.model).values(),
        ]
        before = [(point, point.observing, point.quantizing) for point in points]
        self.set_mode(**how)
        observes = self._observes
        try:
            yield self.model
        finally:
            self._observes = observes
            for point, observing, quantizing in before:
                point.observing = observing
                point.quantizing = quantizing

    @property
    def twin(self) -> nn.Module:
        """The float model, its layers named as the sites: from before transforms, or of now."""
        return self._twin[0] if self._twin else self.float_copy()

    def keep_twin(self) -> None:
        """Takes the twin now, whatever becomes of the model."""
        self._twin = [self.float_copy()]

    def float_copy(self) -> nn.Module:
        """Returns a copy of the model as it is now, with fake quantization off, in eval mode."""
        with self.mode(observing=False, quantizing=False):
            return copy_model(self.model).eval()

    @torch.no_grad()
    def observe(self, batches: Batches) -> None:
        """Runs the batches, outputs in float, and lets their ranges be observed, in place."""
        self.eval()
        points = output_points(self.model).values()
        for point in points:
            point.observe(True)
            point.quantizing = False
        for inputs in batches:
            self(*cloned(inputs))
        for point in points:
            point.observe(False)

    def _leave_float(self, inputs: tuple[Any, ...]) -> None:
        """Takes the format from output layers that run in float anyway: a sigmoid after all stubs.

        Only a forward pass shows which these are; the first one does.
        """
        self._knows_regions = True
        names = self._of_regions()
        if not names:
            return
        with self.mode(observing=False, quantizing=False) as model:
            found = running_in_float(model, self.plan, names, cloned(inputs))
        for name in found:
            self.leave_float(name)

    def _of_regions(self) -> set[str]:
        """Returns the layers whose output is quantized only where they run between the stubs."""
        found = sites(self.model).items()
        own = {name for name, site in found if isinstance(site, QuantModule)}
        return {
            name
            for name, layer in self.plan.items()
            if layer.output and (layer.reason or name in own)
        }

    def leave_float(self, name: str) -> None:
        """Takes the fake quantization from the output of a site, in place."""
        leave_float(self.model, name)
        self.plan[name] = replace(self.plan[name], output=None)

    def leave_float_as(self, plan: dict[str, Any]) -> None:
        """Takes the output's format from the layers that have none in a report's plan, in place."""
        for name, layer in plan.items():
            if (
                layer["output"] is None
                and name in self.plan
                and self.plan[name].output is not None
            ):
                self.leave_float(name)
        self._knows_regions = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        saved = {
            name
            for name in self._of_regions()
            if f"{prefix}model.{name}.output_q.scale" in state_dict
        }
        # A forward pass has shown that it runs in float
        for name in self._of_regions() - saved:
            self.leave_float(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def inputs(
        self, name: str, batches: Batches, *, of: str = "simulation"
    ) -> Iterator[tuple[Any, ...]]:
        """Yields what the site of that name is called with; see `calls`."""
        return (args for _, args in self.calls([name], batches, of=of))

    def calls(
        self, names: Iterable[str], batches: Batches, *, of: str = "simulation"
    ) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yields (site, what it is called with), call by call; till then all quantizes.

        Args:
            names: of the sites.
            of: the model that runs: "simulation", or "twin".
        """
        found: list[tuple[str, tuple[Any, ...]]] = []
        with self.mode(observing=False, quantizing=True) as model:
            model = self.twin if of == "twin" else model
            hooks = [
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, named, name=name: found.append(
                        (name, by_place(args, named))
                    ),
                    with_kwargs=True,
                )
                for name in names
            ]
            try:
                for inputs in batches:
                    model(*cloned(inputs))
                    yield from found
                    found.clear()
            finally:
                for hook in hooks:
                    hook.remove()

    @property
    def floats(self) -> dict[str, str]:
        """{module that capturing left float: why}."""
        leaves = self.capture.get("leaves", {})
        found: dict[str, str] = self.capture.get("float", {})
        return found | {name: leaf["reason"] for name, leaf in leaves.items()}

    def float_state_dict(self) -> dict[str, Tensor]:
        """Returns the float weights as they are now, for `load_state_dict` of the user's class.

        Raises:
            ValueError: some were worked into others.
        """
        return (
            self.model.state_dict()
            if self.home is None
            else self.home.state_dict(self.model)
        )

    def as_converted(self) -> "Simulation":
        """Returns a copy that behaves as what `convert` makes: quantizing, in eval mode."""
        copied = copy_model(self).eval()
        copied.set_mode(observing=False, quantizing=True)
        for point in (
            output_points(copied.model).values() if self.clips_at_type else ()
        ):
            point.clip_as_kernels()
        return copied._put_others()

    def convert(self) -> nn.Module:
        """Returns the model that runs on integers, on the CPU, in eval mode; a new one."""
        copied = copy_model(self)._put_others()
        if self.backend is not None:
            return self.backend.lower(copied)
        without_values = any(x.is_meta for x in copied.model.parameters())
        return (copied.model if without_values else copied.model.cpu()).eval()

    def _put_others(self) -> "Simulation":
        """Puts what takes the place of float layers there, in place."""
        for name, other in self.others.items():
            other.put(self.model, name)
        return self

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Lets the statistics of all batch-norms stand still, in place, or move again."""
        for module in self.model.modules():
            if isinstance(module, QuantWeighted):
                module.freeze(frozen)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(self.training and not frozen)
