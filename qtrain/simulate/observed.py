"""What is known of a tensor's range, and the scale and zero point that follow from it."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.functional.qparams import range_qparams
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver

KERNELS = ("qtrain", "torch")


class Observed(nn.Module):
    """An observer, with the scale and zero point of what it saw.

    Args:
        observer: an observer of torch's interface: forward(x) records,
            calculate_qparams() -> (scale, zero_point).
        kernel: "qtrain", or "torch": torch's observers as they are.
        memoryless: forget the range before each observation.

    Attributes:
        stays: whether scale and zero point are kept (PTQ's weights, an algorithm's
            choice); else they follow what is observed.

    Raises:
        ValueError: there is no such kernel.

    Shapes: scale and zero_point are [1] per tensor, [C] per channel.
    """

    scale: Tensor
    zero_point: Tensor
    observer: Any

    def __init__(self, observer: Any, *, kernel: str, memoryless: bool) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel}: allowed are {', '.join(KERNELS)}")
        super().__init__()
        self.observer, self.kernel, self.memoryless = observer, kernel, memoryless
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
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.stays = False
        # For a min-max observer this module updates the observer's buffers itself.
        folds = type(observer) in (MinMaxObserver, MovingAverageObserver)
        self._folded = kernel == "qtrain" and folds
        self._rule: dict[str, Any] = {
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "symmetric": self.is_symmetric,
        }
        if self._folded:
            self._rule["eps"] = observer.eps
        self._known = _Known()

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
        self.stays = True
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

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._known = _Known()  # tensors among it may be on another device now
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.calculate_qparams()  # may not have been asked for yet
        super()._save_to_state_dict(*args)
        if self.stays:
            destination, prefix, _ = args
            destination[f"{prefix}stays"] = torch.tensor(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # A fresh module has one scale; the saved one may have one a channel.
        for name in ("scale", "zero_point"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=self.scale.device))
        # Of an algorithm's choice; else it is as it was made
        self.stays |= bool(state_dict.pop(f"{prefix}stays", False))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._known = _Known()  # the observer's state, loaded next, says all


@dataclass(slots=True)
class _Known:
    """What a FakeQuantize works out of its observer; no module, whose attributes are slow."""

    numbers: tuple[float, int] | None = None  # scale and zero point
    qparams: tuple[Tensor, Tensor | None] | None = None
    # Asking the observer again would wait for the device in every step
    observed: bool = False
