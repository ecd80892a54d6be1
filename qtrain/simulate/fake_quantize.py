"""FakeQuantize: observe a tensor, then replace it by what its integers would mean.

One module serves PTQ and QAT, weights and activations, so that calibration,
simulation and conversion read the same scale and zero point.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.functional.qparams import range_numbers
from qtrain.simulate.by_numbers import fake_quantize_by_numbers, within_reach
from qtrain.simulate.kernels import fake_quantize, fake_quantize_unclipped
from qtrain.simulate.observed import Observed


class FakeQuantize(Observed):
    """Observes if `observing`; returns dequantize(quantize(x)) if `quantizing`, else x itself.

    x_out = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point)
    * scale, rounding half to even; the gradient passes straight through inside the
    clipping range alone.

    Args:
        observer: an observer of torch's interface: forward(x) records,
            calculate_qparams() -> (scale, zero_point).
        kernel: "qtrain", or "torch": torch's kernels and observers, the slow
            reference.
        memoryless: forget the range before each observation. For weights, which are
            seen whole every time.
        observing: whether forward records the tensor's range.
        quantizing: whether forward fake-quantizes.

    Attributes:
        fuse_relu: whether forward works on relu(x) in place of x.
        scale_free: whether the largest magnitude of each channel becomes the last
            integer, on either side: then nothing is clipped, and a channel's integers
            stay whatever it is multiplied by, but for their sign.

    Raises:
        ValueError: there is no such kernel.

    Shapes: x is any tensor; scale and zero_point are [1] per tensor, [C] per channel.
    """

    def __init__(
        self,
        observer: Any,
        *,
        kernel: str = "qtrain",
        memoryless: bool = False,
        observing: bool,
        quantizing: bool,
    ) -> None:
        super().__init__(observer, kernel=kernel, memoryless=memoryless)
        self.observing, self.quantizing = observing, quantizing
        self.fuse_relu = False
        self._axis = self.ch_axis if self.is_per_channel else None
        self._limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        is_narrow = self.is_symmetric and self.quant_min == -self.quant_max
        self.scale_free = (
            is_narrow
            and self._folded
            and memoryless
            and self.is_per_channel
            and self.ch_axis == 0
        )
        self._last = torch.tensor(float(self.quant_max), device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        output = None
        if (
            self.kernel == "qtrain"
            and x.dtype == torch.float32
            and not is_compiling()
        ):
            if self.scale_free:
                output = self._unclipped(x) if self.observing else None
            # On a CPU, reading scales as Python numbers needs no sync with a device.
            elif not self.is_per_channel and x.is_cpu and x.numel():
                if self._folded or not self.observing:
                    output = self._by_numbers(x)
        if output is not None:
            return output
        if self.fuse_relu:
            x = F.relu(x)
        if self.observing:
            self._observe(x.detach())
        return self._by_tensors(x) if self.quantizing else x

    def _unclipped(self, x: Tensor) -> Tensor:
        """Returns what forward does for scale-free weights, in the fewest operations."""
        scale = self.observer.symmetric_scale(x.detach(), self._last)
        known = self._known
        known.observed = True
        known.qparams = scale, None
        known.numbers = None
        if not self.quantizing:
            return x
        return fake_quantize_unclipped(x, scale.view(-1, *[1] * (x.ndim - 1)))

    def _by_numbers(self, x: Tensor) -> Tensor | None:
        """Returns what forward does; None, having changed nothing, where numbers do not do."""
        known, ends = self._known, None
        if self.observing:
            first = (
                self.memoryless or not known.observed and self.observer.is_untouched()
            )
            found = self.observer.observe_scalars(
                x.detach(), first=first, rectified=self.fuse_relu
            )
            if found is None:
                return None
            ends, observed = found
            known.observed, known.qparams = True, None
            known.numbers = range_numbers(*observed, **self._rule)
        if not self.quantizing:
            return F.relu(x) if self.fuse_relu else x
        if known.numbers is None:
            scale, zero_point = self._qparams()
            known.numbers = (
                scale.item(),
                0 if zero_point is None else int(zero_point.item()),
            )
        if not within_reach(known.numbers[0]):
            return None
        return fake_quantize_by_numbers(
            x, *known.numbers, **self._limits, rectify=self.fuse_relu, ends=ends
        )

    def _by_tensors(self, x: Tensor) -> Tensor:
        scale, zero_point = self._qparams()
        axis = self._axis
        if self.kernel == "qtrain":
            return fake_quantize(x, scale, zero_point, **self._limits, axis=axis)
        numbers: list[Any] = [scale, zero_point, self.quant_min, self.quant_max]
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, *numbers)
        numbers.insert(2, axis)
        return torch.fake_quantize_per_channel_affine(x, *numbers)

    def quantize_scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """Returns `forward(x * factor) / factor`, up to rounding, without these products.

        Args:
            x: a layer's weight (C, ...).
            factor: (C,), not 0; gets no gradient.
        """
        if not (self.observing or self.quantizing):
            return x
        if not (self._folded and self.memoryless and self.observing):
            factor = factor.reshape(-1, *[1] * (x.ndim - 1))
            scaled: Tensor = self(x * factor)
            return scaled / factor
        known = self._known
        known.qparams = known.numbers = None
        self.observer.observe_scaled(x.detach(), factor)
        if not self.quantizing:
            return x
        scale, zero_point = self._qparams()
        zero_point = None if zero_point is None else zero_point.expand(len(factor))
        return fake_quantize(x, scale / factor, zero_point, **self._limits, axis=0)

    def observe(self, wanted: bool) -> None:
        """Lets it record ranges from now on, in place, or not; one whose scale stays never does."""
        self.observing = wanted and not self.stays

    def stay(
        self, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        super().stay(scale, zero_point)
        self.observing = False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.observe(self.observing)

    def clip_as_kernels(self) -> None:
        """Clips, in place, as int8 kernels: at the ends of uint8, if the scale be for 0..127."""
        self.quant_min, self.quant_max = 0, 255
        self._limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}

    def extra_repr(self) -> str:
        low, high = self.quant_min, self.quant_max
        return (
            f"{self.qscheme}, {low}..{high}, observing={self.observing}, "
            f"quantizing={self.quantizing}"
        )
