"""QuantSpec: what one kind of tensor (weights or activations) is quantized to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qtrain.common.validate import MANY, boolean, choice, refuse, whole

AUTO = "auto"
CODEBOOKS = ("nf4", "fp4")
BLOCK_SIZES = tuple(2**power for power in range(5, 13))
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


def int_range(
    bits: int, signed: bool, *, restricted: bool = False
) -> tuple[int, int]:
    """Returns (quant_min, quant_max), the integers that `bits` bits can hold.

    restricted drops the most negative signed integer, so that the range is symmetric
    about 0.

    >>> int_range(8, signed=True), int_range(8, signed=False)
    ((-128, 127), (0, 255))
    >>> int_range(4, signed=True, restricted=True)
    (-7, 7)
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + restricted, 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class FloatFormat:
    """A float of fewer bits, where integers have a QuantSpec.

    Args:
        dtype: torch's name of it: "float16", "bfloat16".
    """

    dtype: str

    def describe(self) -> dict[str, Any]:
        """Returns what reports show of a number format."""
        return {
            "bits": 16,
            "symmetric": None,
            "granularity": None,
            "group_size": None,
            "observer": None,
        }


@dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """Four bits that stand for the numbers of a table, see `functional.codebook`.

    Args:
        format: "nf4" or "fp4".
        block_size: neighbours in the flattened weight that share a scale, a power of
            2 from 32 to 4096.
        double_quant: whether scales are stored in 8 bits.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    bits = 4

    def __post_init__(self) -> None:
        refuse(
            choice("format", self.format, CODEBOOKS)
            + choice("block_size", self.block_size, BLOCK_SIZES)
            + boolean("double_quant", self.double_quant)
        )

    def describe(self) -> dict[str, Any]:
        """Returns what reports show of a number format."""
        return {
            "bits": self.bits,
            "symmetric": None,
            "granularity": "per_block",
            "group_size": self.block_size,
            "observer": None,
            "format": self.format,
            "double_quant": self.double_quant,
        }


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one kind of tensor is quantized; `backend.torch_ao.Engine.settle` settles "auto".

    Args:
        bits: width of the integers, 2..8. They are stored as 8-bit integers by
            torch's kernels.
        symmetric: zero maps to the middle of the range (weights: to 0), or "auto".
        granularity: which elements share a scale. Of a weight [A, B]: "per_tensor" ->
            scale [], "per_channel" -> scale [A], "per_group" -> scale [A, B /
            group_size]; or "auto", which is "per_group" with a group_size.
        group_size: neighbours along the last axis that share a scale; of
            "per_group" alone.
        observer: the name of a file in conf/observer, its mapping, or a factory of
            observers.
        reduce_range: leave out the top bit, for kernels whose 16-bit accumulators
            would saturate.
        narrow_range: leave out the lowest signed integer: symmetric weights then end
            exactly at the integers' ends, and none is clipped; or "auto", the
            method's rule.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    bits: int = 8
    symmetric: bool | str = AUTO
    granularity: str = AUTO
    group_size: int | None = None
    observer: Callable[..., Any] | None = None
    reduce_range: bool | str = AUTO
    narrow_range: bool | str = AUTO

    def __post_init__(self) -> None:
        problems = (
            whole("bits", self.bits, 2, 8)
            + boolean("symmetric", self.symmetric, AUTO)
            + boolean("reduce_range", self.reduce_range, AUTO)
            + boolean("narrow_range", self.narrow_range, AUTO)
            + choice("granularity", self.granularity, (*GRANULARITIES, AUTO))
            + whole("group_size", self.group_size, 1, MANY, null=True)
        )
        if not problems and self.granularity == AUTO and self.group_size:
            object.__setattr__(self, "granularity", "per_group")
        if not problems and (self.granularity == "per_group") != (
            self.group_size is not None
        ):
            problems.append(
                f"group_size={self.group_size}: "
                "goes with granularity=per_group, and only with it"
            )
        if self.observer is not None and not callable(self.observer):
            problems.append(
                f"observer={self.observer}: must be a callable that makes an observer"
            )
        refuse(problems)

    def quant_range(self, signed: bool) -> tuple[int, int]:
        """Returns (quant_min, quant_max) of this spec; reduce_range leaves 7 bits of 8.

        >>> QuantSpec(bits=8, reduce_range=True).quant_range(signed=False)
        (0, 127)
        """
        bits = min(self.bits, 7) if self.reduce_range is True else self.bits
        return int_range(bits, signed, restricted=self.narrow_range is True)

    def describe(self) -> dict[str, Any]:
        """Returns the fields as plain values, for reports; the observer by its name."""
        factory = getattr(self.observer, "func", self.observer)
        return {
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "reduce_range": self.reduce_range,
            "narrow_range": self.narrow_range,
            "observer": getattr(
                factory, "short_name", getattr(factory, "__name__", None)
            ),
        }
