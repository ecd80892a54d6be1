"""Transform: what every improvement of a simulation is."""

from typing import Any

from torch import nn

from qtrain.simulate.simulation import Batches, Simulation


class Transform:
    """Changes a simulation in place, between preparation and conversion, by its `__call__`.

    Weights are replaced through a site's `set_weight` and `shift_bias`, scales
    through `weight_q.stay` and `output_q.stay`: what it chooses is what is converted.

    Attributes:
        name: by which reports call it.
        before_observation: whether it leaves the float function as it is, and so
            comes before ranges are observed.
    """

    name: str
    before_observation = False

    def restructure(self, model: nn.Module) -> None:
        """Changes the float model, in place, and not what it computes; a saved one's too."""

    def __call__(self, simulation: Simulation, batches: Batches) -> None:
        """Improves `simulation`, in place.

        Args:
            batches: forward's arguments, of calibration data; may be gone through
                again and again.
        """
        raise NotImplementedError

    def found(self) -> dict[str, Any]:
        """Returns what else a report shall say of its last call, as plain values."""
        return {}
