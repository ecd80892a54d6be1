"""FakeQuantize: observe a tensor, then replace it by what its integers would mean.

One module serves PTQ and QAT, weights and activations, so that calibration, simulation
and conversion read the same scale and zero point.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.functional.qparams import range_numbers, range_qparams
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver
from qtrain.simulate.kernels import (
    fake_quantize,
    fake_quantize_by_numbers,
    fake_quantize_unclipped,
    within_reach,
)

KERNELS = ("qtrain", "torch")


class FakeQuantize(nn.Module):
    """Observes if `observing`; returns dequantize(quantize(x)) if `quantizing`, else x itself.

    x_out = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) *
    scale, rounding half to even; the gradient passes straight through inside the
    clipping range alone.

    Args:
        observer: an observer of torch's interface: forward(x) records,
            calculate_qparams() -> (scale, zero_point).
        kernel: "qtrain", or "torch": torch's kernels and observers, the slow reference.
        memoryless: forget the range before each observation. For weights, which are
            seen whole every time.
        observing: whether forward records the tensor's range.
        quantizing: whether forward fake-quantizes.

    Attributes:
        stays: whether scale and zero point are kept (PTQ's weights, an algorithm's
            choice); else they follow what is observed.
        rectifies: whether forward works on relu(x) in place of x.
        scale_free: whether the largest magnitude of each channel becomes the last
            integer, on either side: then nothing is clipped, and a channel's integers
            stay whatever it is multiplied by, but for their sign.

    Raises:
        ValueError: there is no such kernel.

    Shapes: x is any tensor; scale and zero_point are [1] per tensor, [C] per channel.
    """

    scale: Tensor
    zero_point: Tensor
    observer: Any

    def __init__(
        self,
        observer: Any,
        *,
        kernel: str = "qtrain",
        memoryless: bool = False,
        observing: bool,
        quantizing: bool,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel}: allowed are {', '.join(KERNELS)}")
        super().__init__()
        self.observer, self.kernel, self.memoryless = observer, kernel, memoryless
        self.observing, self.quantizing = observing, quantizing
        self.dtype, self.qscheme = observer.dtype, observer.qscheme
        self.quant_min = int(observer.quant_min)
        self.quant_max = int(observer.quant_max)
        self.is_per_channel = self.qscheme in (
            torch.per_channel_affine,
            torch.per_channel_symmetric,
        )
        self.is_symmetric = self.qscheme in (
            torch.per_tensor_symmetric,
            torch.per_channel_symmetric,
        )
        self.ch_axis = int(getattr(observer, "ch_axis", -1))
        self._axis = self.ch_axis if self.is_per_channel else None
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.rectifies = False
        self.stays = False
        self._limits: dict[str, Any] = {
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
        }
        # A min-max observer's work is done here, on its own buffers, which stay the
        # truth.
        folds = type(observer) in (MinMaxObserver, MovingAverageObserver)
        self._folded = kernel == "qtrain" and folds
        self._rule = {**self._limits, "symmetric": self.is_symmetric}
        if self._folded:
            self._rule["eps"] = observer.eps
        is_narrow = self.is_symmetric and self.quant_min == -self.quant_max
        self.scale_free = (
            is_narrow
            and self._folded
            and memoryless
            and self.is_per_channel
            and self.ch_axis == 0
        )
        self._last = torch.tensor(float(self.quant_max), device="cpu")
        self._known = _Known()

    def forward(self, x: Tensor) -> Tensor:
        output = None
        if self.kernel == "qtrain" and x.dtype == torch.float32 and not is_compiling():
            if self.scale_free:
                output = self._unclipped(x) if self.observing else None
            # Numbers, where to read one costs nothing.
            elif not self.is_per_channel and x.is_cpu and x.numel():
                if self._folded or not self.observing:
                    output = self._by_numbers(x)
        if output is not None:
            return output
        if self.rectifies:
            x = F.relu(x)
        if self.observing:
            self._observe(x.detach())
        return self._by_tensors(x) if self.quantizing else x

    def _unclipped(self, x: Tensor) -> Tensor:
        """Returns what forward does for scale-free weights, in the fewest operations."""
        scale = self.observer.observe_magnitude(x.detach(), self._last)
        known = self._known
        known.observed, known.qparams, known.numbers = True, (scale, None), None
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
            found = self.observer.observe_numbers(
                x.detach(), first=first, rectified=self.rectifies
            )
            if found is None:
                return None
            ends, observed = found
            known.observed, known.qparams = True, None
            known.numbers = range_numbers(*observed, **self._rule)
        if not self.quantizing:
            return F.relu(x) if self.rectifies else x
        if known.numbers is None:
            scale, zero_point = self._qparams()
            known.numbers = (
                scale.item(),
                0 if zero_point is None else int(zero_point.item()),
            )
        if not within_reach(known.numbers[0]):
            return None
        return fake_quantize_by_numbers(
            x, *known.numbers, **self._limits, rectify=self.rectifies, ends=ends
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

    def _observe(self, x: Tensor) -> None:
        known = self._known
        known.qparams = known.numbers = None
        if self._folded:
            first = (
                self.memoryless or not known.observed and self.observer.is_untouched()
            )
            self.observer.observe(x, first=first)
        else:
            if self.memoryless:
                self.observer.reset_min_max_vals()
            self.observer(x)

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

    def _qparams(self) -> tuple[Tensor, Tensor | None]:
        """Returns (scale, zero_point or None for 0) of what was observed; once an observation.

        Raises:
            ValueError: nothing was observed.
        """
        # A tracer's tensors hold no numbers
        known = _Known() if is_compiling() else self._known
        if known.qparams is None:
            if self.stays:
                known.qparams = self.scale, self.zero_point
                return known.qparams
            if not self.has_observed():
                raise ValueError(
                    "it runs now, but did not during calibration, "
                    "so its scale is unknown"
                )
            if self._folded:
                # Past nn.Module's attributes, which are slow
                seen = self.observer._buffers
                known.qparams = range_qparams(
                    seen["min_val"], seen["max_val"], **self._rule
                )
            else:
                scale, zero_point = self.observer.calculate_qparams()
                device = self.scale.device
                known.qparams = (
                    scale.to(device, torch.float32).reshape(-1),
                    zero_point.to(device, torch.int32).reshape(-1),
                )
        return known.qparams

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Returns (scale, zero_point) of what was observed; of nothing, (1, 0)."""
        if self.has_observed():
            self.scale, zero_point = self._qparams()
            if zero_point is None:
                zero_point = torch.zeros_like(self.scale, dtype=torch.int32)
            self.zero_point = zero_point
        return self.scale, self.zero_point

    def stay(
        self, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        """Keeps scale and zero point from now on, in place, whatever becomes of the tensor.

        Args:
            scale: float32, [1] or [C]; by default that of what was observed.
            zero_point: int32, likewise.
        """
        self.calculate_qparams()
        if scale is not None:
            self.scale = scale
        if zero_point is not None:
            self.zero_point = zero_point
        self.stays, self.observing = True, False
        self._known = _Known()

    def has_observed(self) -> bool:
        """Returns whether its scale is known: the observer has seen a tensor, or it stays."""
        if self.stays:
            return True
        if not self._known.observed:
            low = self.observer.min_val
            self._known.observed = low.numel() > 0 and bool(
                (low <= self.observer.max_val).all()
            )
        return self._known.observed

    def observed_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest value observed."""
        return float(self.observer.min_val.min()), float(self.observer.max_val.max())

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

    def _apply(self, *args: Any, **kwargs: Any) -> "FakeQuantize":
        self._known = _Known()  # tensors among it may be on another device now
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.calculate_qparams()  # may not have been asked for yet
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # A fresh module has one scale; the saved one may have one a channel.
        for name in ("scale", "zero_point"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._known = _Known()  # the observer's state, loaded next, says all


@dataclass(slots=True)
class _Known:
    """What a FakeQuantize works out of its observer; no module, whose attributes are slow."""

    numbers: tuple[float, int] | None = None  # scale and zero point
    qparams: tuple[Tensor, Tensor | None] | None = None
    # Asking the observer again would wait for the device in every step
    observed: bool = False
