"""How floats become integers, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How a layer's output becomes integers: clamp(round(x / scale) + zero_point, low, high)."""

    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def is_full(self) -> bool:
        """Returns whether the ends are those of the type, at which kernels clip by themselves."""
        return self.low <= 0 and self.high >= 255
