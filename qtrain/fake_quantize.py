"""FakeQuantize: observe a tensor, then replace it by what its integers would mean.

One module serves PTQ and QAT, weights and activations, so that calibration, simulation and conversion read the same
scale and zero point.
"""

from typing import Any

import torch
from torch import nn

from qtrain.eager import FakeQuantizeBase, is_min_max, observe_min_max
from qtrain.functional.fake_quantize import fake_quantize, range_qparams

KERNELS = ("qtrain", "torch")


class FakeQuantize(FakeQuantizeBase):
    """Observes where `observing`, and returns dequantize(quantize(x)) where `quantizing`, else x itself.

    x_out = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale, rounding half to even;
    the gradient is passed straight through inside the clipping range and is 0 outside.

    Args:
        observer: an observer of torch's interface: forward(x) records, calculate_qparams() -> (scale, zero_point).
        kernel: "qtrain", or "torch": torch's kernels and observers, many times slower, as the reference.
        memoryless: forget the range before each observation. For weights, which are seen whole every time.
        observing: whether forward records the tensor's range.
        quantizing: whether forward fake-quantizes.

    Raises:
        ValueError: there is no such kernel.

    Shapes: x is any tensor; scale and zero_point are [1] per tensor, [C] per channel.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    observer: Any

    def __init__(
        self, observer: Any, *, kernel: str = "qtrain", memoryless: bool = False, observing: bool, quantizing: bool
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel}: allowed are {', '.join(KERNELS)}")
        nn.Module.__init__(self)  # not the base's: it keeps its switches in tensors, and reads them in every forward
        self.observer, self.kernel, self.memoryless = observer, kernel, memoryless
        self.observing, self.quantizing = observing, quantizing
        self.dtype, self.qscheme = observer.dtype, observer.qscheme
        self.quant_min, self.quant_max = int(observer.quant_min), int(observer.quant_max)
        self.is_per_channel = self.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
        self.ch_axis = int(getattr(observer, "ch_axis", -1))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self._settled = False  # whether scale and zero_point stand for what the observer has seen
        # A min-max observer's work is done here, on the observer's own buffers, which stay the truth.
        self._folded = kernel == "qtrain" and is_min_max(observer)
        self._observed = False  # has_observed() was true once; asking again would wait for the device in every step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            if self._folded:
                observe_min_max(self.observer, x.detach(), first=self.memoryless or self._untouched())
            else:
                if self.memoryless:
                    self.observer.reset_min_max_vals()
                self.observer(x.detach())
            self._settled = False
        if not self.quantizing:
            return x
        scale, zero_point = self.calculate_qparams()
        if not self._settled:
            raise ValueError("it runs now, but did not during calibration, so its scale is unknown")
        limits = self.quant_min, self.quant_max
        if self.kernel == "qtrain":
            axis = self.ch_axis if self.is_per_channel else None
            return fake_quantize(x, scale, zero_point, quant_min=limits[0], quant_max=limits[1], axis=axis)
        if self.is_per_channel:
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, self.ch_axis, *limits)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (scale, zero_point) of what was observed; worked out once an observation, not once a call."""
        if not self._settled and self.has_observed():
            scale, zero_point = self._range_qparams() if self._folded else self.observer.calculate_qparams()
            self.scale = scale.to(self.scale.device, torch.float32).reshape(-1)
            self.zero_point = zero_point.to(self.zero_point.device, torch.int32).reshape(-1)
            self._settled = True
        return self.scale, self.zero_point

    def has_observed(self) -> bool:
        """Tells whether the observer has seen any tensor (torch's hold an infinite range until then)."""
        if not self._observed:
            low = self.observer.min_val
            self._observed = low.numel() > 0 and bool((low <= self.observer.max_val).all())
        return self._observed

    def _untouched(self) -> bool:
        return not self._observed and (self.observer.min_val.numel() == 0 or bool(self.observer.min_val.isinf().all()))

    def _range_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return range_qparams(
            self.observer.min_val,
            self.observer.max_val,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric),
            eps=self.observer.eps,
        )

    def observed_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest value observed."""
        return float(self.observer.min_val.min()), float(self.observer.max_val.max())

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self.quantizing = enabled

    def enable_observer(self, enabled: bool = True) -> None:
        self.observing = enabled

    def extra_repr(self) -> str:
        low, high = self.quant_min, self.quant_max
        return f"{self.qscheme}, {low}..{high}, observing={self.observing}, quantizing={self.quantizing}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A fresh module has one scale; the saved one may have one a channel.
        for name in ("scale", "zero_point"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The observer's state, loaded next, says more: the scale may not have been asked for yet.
        self._settled = self._observed = False
