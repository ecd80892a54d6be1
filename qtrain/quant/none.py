"""No quantization: the float model itself, as the baseline of a comparison."""

from qtrain.quant.base import Quantizer


class NoQuantizer(Quantizer):
    """Passes the float model through."""
