"""A transform, an observer, a backend and an exporter of a user's own."""

import json
from dataclasses import dataclass

import torch

from qtrain.backend.reference.backend import Reference
from qtrain.exporter.base import Exporter
from qtrain.observer.base import Observer
from qtrain.simulate.points import weight_points
from qtrain.transform.base import Transform


class Halved(Transform):
    """Halves the scale of all weights: the integers of the largest are cut off."""

    name = "halved"

    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def __call__(self, simulation, batches):
        assert len(list(batches)) == len(list(batches)) > 0  # again and again
        for point in weight_points(simulation.model).values():
            scale, zero_point = point.calculate_qparams()
            point.stay(scale / self.by, zero_point)


class ThreeSigma(Observer):
    """The range of three standard deviations about the mean."""

    short_name = "three_sigma"

    def forward(self, x):
        self.min_val = (x.mean() - 3 * x.std()).clamp(min=float(x.min()))
        self.max_val = (x.mean() + 3 * x.std()).clamp(max=float(x.max()))
        return x


@dataclass(frozen=True)
class Loud(Reference):
    """The reference backend, that says when it lowers."""

    name: str = "loud"
    granularity: str = "per_tensor"

    def lower(self, simulation):
        print("lowering for loud")
        return super().lower(simulation)


class AsJson(Exporter):
    """The scales of all outputs."""

    name = "as_json"
    file_name = "scales.json"
    max_steps = 1e9

    def write(self, simulation, example, path):
        path.write_text(
            json.dumps(
                {
                    n: float(p.scale.max())
                    for n, p in weight_points(simulation.model).items()
                }
            )
        )

    def run(self, path, inputs):
        assert json.loads(path.read_text())
        return torch.zeros(len(inputs[0]), 10)
