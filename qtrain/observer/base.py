"""What every observer is: it sees tensors, and says which range their integers shall span."""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.functional.qparams import range_qparams
from qtrain.functional.spec import AUTO, QuantSpec

# As torch's own observers want them; a torch without quantized tensors has the plain
# ones alone.
SIGNED = getattr(torch, "qint8", torch.int8)
UNSIGNED = getattr(torch, "quint8", torch.uint8)
EPS = torch.finfo(torch.float32).eps  # the smallest scale
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class Observer(nn.Module):
    """Records tensors in `forward`, and gives a range of them in `range`; a subclass says how.

    Args:
        dtype: torch.qint8 for weights, torch.quint8 for activations.
        qscheme: torch's: per tensor or per channel, affine or symmetric.
        quant_min, quant_max: the integers that the range is mapped onto.
        eps: the smallest scale.

    Attributes:
        min_val, max_val: the smallest and the largest value seen, [] or [C]; infinite
            before that.
    """

    short_name: str  # by which reports and messages call it
    min_val: Tensor
    max_val: Tensor

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        quant_min: int,
        quant_max: int,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.qscheme = qscheme
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.eps = eps
        self.is_per_channel = qscheme in PER_CHANNEL
        self.is_symmetric = qscheme in SYMMETRIC
        self.ch_axis = 0
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """Records `x` and returns it."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """Returns (low, high), [] or [C], of what was recorded."""
        return self.min_val, self.max_val

    def reset_min_max_vals(self) -> None:
        """Forgets what was recorded.

        Raises:
            NotImplementedError: this observer cannot, so that it serves no weights.
        """
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Returns (scale, zero_point), [1] or [C], of `range`."""
        scale, zero_point = range_qparams(
            *self.range(),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.is_symmetric,
            eps=self.eps,
        )
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return scale, zero_point

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # One number in a fresh observer, one a channel in a saved one.
        for name in ("min_val", "max_val"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(
                    self, name, torch.empty_like(saved, device=self.min_val.device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def refuse_per_channel(observer: str, qscheme: torch.qscheme) -> None:
    """Raises ValueError where an observer of one range a tensor is asked for one a channel."""
    if qscheme in PER_CHANNEL:
        raise ValueError(
            f"observer={observer}: finds one range a tensor, not one a channel; "
            "use observer=minmax or moving_average, or granularity=per_tensor"
        )


def make_observer(spec: QuantSpec, *, signed: bool) -> Any:
    """Returns an observer for a settled spec; signed for weights, unsigned for activations."""
    assert spec.observer is not None and AUTO not in (
        spec.symmetric,
        spec.granularity,
    ), spec
    kind = f"{spec.granularity}_{'symmetric' if spec.symmetric else 'affine'}"
    low, high = spec.quant_range(signed)
    return spec.observer(
        dtype=SIGNED if signed else UNSIGNED,
        qscheme=getattr(torch, kind),
        quant_min=low,
        quant_max=high,
    )
