"""Number formats: what one number costs and what it can say."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """A signed binary number format: IEEE-like, or two's complement if it has no exponent.

    Args:
        name: as in configs and tables.
        exponent: bits of the exponent; 0 for integers.
        mantissa: bits of the mantissa; of integers, all bits but the sign.

    >>> bf16 = FORMATS["bf16"]
    >>> bf16.bits, bf16.bytes, bf16.largest, bf16.epsilon
    (16, 2.0, 3.3895313892515355e+38, 0.0078125)
    >>> int4 = FORMATS["int4"]
    >>> int4.bits, int4.bytes, int4.lowest, int4.largest, int4.step
    (4, 0.5, -8.0, 7.0, 1.0)
    """

    name: str
    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        """Width: sign, exponent and mantissa."""
        return 1 + self.exponent + self.mantissa

    @property
    def bytes(self) -> float:
        """Size of one number in a packed array."""
        return self.bits / 8

    @property
    def _bias(self) -> int:
        return (1 << self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        """Largest finite number: `(2 - 2^-mantissa) * 2^bias`, or `2^mantissa - 1`."""
        return (
            (2 - 2.0**-self.mantissa) * 2.0**self._bias
            if self.exponent
            else 2.0**self.mantissa - 1
        )

    @property
    def lowest(self) -> float:
        """Most negative finite number."""
        return -self.largest if self.exponent else -(2.0**self.mantissa)

    @property
    def step(self) -> float:
        """Smallest distance between two numbers; of floats `2^(1 - bias - mantissa)` (denormal)."""
        return 2.0 ** (1 - self._bias - self.mantissa) if self.exponent else 1.0

    @property
    def epsilon(self) -> float:
        """Distance between 1 and the next number: `2^-mantissa`, or 1."""
        return 2.0**-self.mantissa if self.exponent else 1.0


FORMATS = {
    fmt.name: fmt
    for fmt in (
        NumberFormat("fp32", 8, 23),
        NumberFormat("fp16", 5, 10),
        NumberFormat("bf16", 8, 7),
        NumberFormat("int8", 0, 7),
        NumberFormat("int4", 0, 3),
        NumberFormat("int3", 0, 2),
        NumberFormat("int2", 0, 1),
    )
}


def memory_gb(billions: float, bits: float, *, overhead: float = 1.2) -> float:
    """Returns the memory to serve a model, `M = P * 4 / (32 / Q) * 1.2`, in GB of 10^9 bytes.

    Args:
        billions: P, parameters in 10^9.
        bits: Q, width of one parameter.
        overhead: factor for all that is not parameters.

    >>> [round(memory_gb(p, q), 1) for p, q in [(70, 32), (7, 8), (7, 4)]]
    [336.0, 8.4, 4.2]
    """
    return billions * 4 / (32 / bits) * overhead
