"""Quantization-aware training: simulated integers, trained straight through, then converted.

B. Jacob et al., arXiv:1712.05877, section 3; R. Krishnamoorthi, arXiv:1806.08342,
section 4.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtrain.common.validate import MANY, boolean, choice, refuse, whole
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.observer.moving_average import MovingAverageObserver
from qtrain.quant.ptq import PTQ, Inputs
from qtrain.simulate.batch_norm import TRAINING
from qtrain.simulate.simulation import Simulation

ACTIVATION = QuantSpec(
    observer=partial(MovingAverageObserver, averaging_constant=0.1)
)


class QAT(PTQ):
    """Trains with fake quantization before converting.

    Args:
        epochs: epochs of quantization-aware training.
        optimizer, scheduler: factories, as at the top level; they serve this training
            alone.
        from_scratch: start from the untrained model, not from the trained float
            model.
        start_epoch: first epoch with fake quantization; null: never, only observe.
        freeze_observers_epoch: first epoch with the ranges of activations frozen;
            null: never.
        freeze_batch_norm_epoch: first epoch with batch-norm statistics frozen; null:
            never.
        conv_bn: how convolutions with batch-norm train: "folded", with one
            convolution, which normalises by the statistics of the quantized weights;
            "exact", with two, by those of the float weights. See
            `qtrain.simulate.batch_norm`.
        convert_every: convert and score the int8 model every so many epochs, at most
            `epochs`, and keep the best; 0: keep the last.
        ptq: engine, weight, activation, fake_quantize and layers, as for PTQ.

    Raises:
        ValueError: an epoch out of range, an observer too slow for training, or what
            PTQ refuses.
    """

    trains = True
    stage = "qat"

    def __init__(
        self,
        *,
        epochs: int = 2,
        optimizer: Any = None,
        scheduler: Any = None,
        from_scratch: bool = False,
        start_epoch: int | None = 0,
        freeze_observers_epoch: int | None = None,
        freeze_batch_norm_epoch: int | None = None,
        conv_bn: str = "folded",
        convert_every: int = 1,
        activation: QuantSpec = ACTIVATION,
        **ptq: Any,
    ) -> None:
        problems = (
            whole("epochs", epochs, 1, MANY)
            + boolean("from_scratch", from_scratch)
            + choice("conv_bn", conv_bn, sorted(TRAINING))
        )
        # Of a wrong number of epochs, nothing follows for the others.
        last = MANY if problems else epochs - 1
        problems += (
            whole("start_epoch", start_epoch, 0, last, null=True)
            + whole(
                "freeze_observers_epoch", freeze_observers_epoch, 0, last, null=True
            )
            + whole(
                "freeze_batch_norm_epoch", freeze_batch_norm_epoch, 0, last, null=True
            )
            + whole("convert_every", convert_every, 0, last + 1)
        )
        try:
            super().__init__(activation=activation, **ptq)
        except ValueError as err:
            problems.append(str(err))
        else:
            if self.activation.describe()["observer"] == "histogram":
                problems.append(
                    "activation.observer=histogram: searches its range anew for each "
                    "batch of the training; use moving_average or minmax"
                )
        refuse(problems)
        self.epochs, self.optimizer, self.scheduler = epochs, optimizer, scheduler
        self.from_scratch = from_scratch
        self.conv_bn = conv_bn
        self.convert_every = convert_every
        self.start_epoch = start_epoch
        self.freeze_observers_epoch = freeze_observers_epoch
        self.freeze_batch_norm_epoch = freeze_batch_norm_epoch

    def _settle(
        self, weight: QuantSpec, activation: QuantSpec
    ) -> tuple[QuantSpec, QuantSpec]:
        if weight.narrow_range == AUTO:  # fewer bits cannot spare an integer
            weight = replace(
                weight,
                narrow_range=weight.bits == 8 and weight.symmetric is not False,
            )
        return super()._settle(weight, activation)

    def prepare(self, model: nn.Module, example: Inputs = ()) -> Simulation:
        return self._simulate(model, example, is_qat=True, conv_bn=self.conv_bn)

    def on_epoch(self, simulation: Simulation, epoch: int) -> None:
        def reached(start: int | None) -> bool:
            return start is not None and epoch >= start

        observing = not reached(self.freeze_observers_epoch)
        simulation.set_mode(observing=observing, quantizing=reached(self.start_epoch))
        simulation.freeze_batch_norm(reached(self.freeze_batch_norm_epoch))
