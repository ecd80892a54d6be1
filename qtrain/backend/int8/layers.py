"""Layers of a lowered model: plain buffers, which can be saved, copied, pickled and exported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend.int8.linear import MANY_ROWS
from qtrain.backend.int8.product import Product
from qtrain.backend.int8.quantizing import quantized
from qtrain.backend.int8.reference import requantized
from qtrain.backend.int8.scale import Scale
from qtrain.backend.int8.tensor import QuantizedTensor, note
from qtrain.common.tensors import counted, version
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import integers
from qtrain.simulate.sites import QuantWeighted

# In state dicts of its int8 layers
OF_TORCH_AO = ("weight", "_packed_params._packed_params")


class Scaled(nn.Module):
    """A layer that puts out integers.

    Args:
        point: the simulation's fake quantization of its output.

    Shapes: scale and zero_point are [1].
    """

    scale: Tensor
    zero_point: Tensor
    _output: Scale | None = None

    def __init__(self, point: FakeQuantize) -> None:
        super().__init__()
        scale, zero_point = point.calculate_qparams()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.low = point.quant_min
        self.high = point.quant_max
        self.output  # noqa: B018  as numbers, while nothing traces

    @property
    def output(self) -> Scale:
        """How its output becomes integers, in numbers; read from the buffers once."""
        if self._output is None:
            numbers = float(self.scale), int(self.zero_point)
            self._output = Scale(*numbers, self.low, self.high)
        return self._output

    def quantized(self, x: Tensor) -> QuantizedTensor:
        """Returns floats as integers of this layer's scale."""
        to = self.output
        found = requantized(x, to.scale, to.zero_point, to.low, to.high)
        return QuantizedTensor(found, to.scale, to.zero_point)

    def forget(self) -> None:
        """Forgets what was worked out of the buffers, in place."""
        self._output = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget()
        self.output  # noqa: B018

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._apply(*args, **kwargs)
        self.forget()
        return found


class Quantize(Scaled):
    """Makes integers of floats; integers of another scale are brought to its own."""

    def forward(self, x: Any) -> QuantizedTensor:
        if isinstance(x, QuantizedTensor):
            x = x.dequantize()
        to = self.output
        return QuantizedTensor(quantized(x, to), to.scale, to.zero_point)


class Dequantize(nn.Module):
    """Makes floats of integers."""

    def forward(self, x: Any) -> Any:
        return x.dequantize() if isinstance(x, QuantizedTensor) else x


@dataclass(frozen=True)
class LayerWeight:
    """A layer's weight, as reports and the truth gate read it."""

    integers: Tensor
    scale: Tensor
    is_quantized = True

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    @property
    def zero_point(self) -> Tensor:
        return torch.zeros_like(self.scale, dtype=torch.int32)

    def numel(self) -> int:
        return self.integers.numel()

    def int_repr(self) -> Tensor:
        return self.integers

    def dequantize(self) -> Tensor:
        return self.integers * self.scale.view(-1, *[1] * (self.integers.dim() - 1))


class IntLayer(Scaled):
    """A Linear layer, convolution or transposed convolution, and maybe a ReLU, on integers.

    Args:
        site: of the simulation, its weight's scale known.
    """

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    _product: tuple[Any, Product] | None = None

    def __init__(self, site: QuantWeighted) -> None:
        assert site.output_q is not None and site.weight_q is not None
        super().__init__(site.output_q)
        weight, bias = site.folded()
        if not site.weight_q.stays:
            # Its scale is that of the last forward, and the weight may have moved.
            site.weight_q(weight)
        scale, _ = site.weight_q.calculate_qparams()
        self.register_buffer(
            "integers", integers(site.weight_q, weight).to(torch.int8)
        )
        self.register_buffer("weight_scale", scale.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.layer = site.layer  # without parameters: it says what is done with them
        self.relu = site.relu
        self.transposed = getattr(site.layer, "transposed", False)

    def weight(self) -> LayerWeight:
        """Returns the weight's integers and scales."""
        return LayerWeight(self.integers, self.weight_scale)

    def forward(self, input: Any) -> QuantizedTensor:
        plain = input.integers if isinstance(input, QuantizedTensor) else input
        if plain.device != self.integers.device:
            raise ValueError(
                f"its input is on {plain.device}, and its weight on "
                f"{self.integers.device}; "
                "move both to one device, as by model.to(x.device)"
            )
        to = self.output
        if plain is not input:
            found = self.product(plain, input.scale, input.zero_point)
        else:
            note("its product with an input that no layer has quantized")
            found = self.product.in_float(input, self.weight().dequantize())
        return QuantizedTensor(found, to.scale, to.zero_point)

    def between(
        self, first: nn.Module, last: nn.Module
    ) -> Callable[[Tensor], Tensor] | None:
        """Returns `last(self(first(x)))` as a call that begins sooner; None where there is none.

        It is made of what they are now.

        Args:
            first, last: what makes integers of floats, and floats of integers.
        """
        if not isinstance(first, Quantize) or not isinstance(last, Dequantize):
            return None
        product = self.product.from_floats(first.output)
        if product is None:
            return None
        most = MANY_ROWS * self.layer.in_features

        def run(x: Tensor) -> Tensor:
            is_plain = x.is_cpu and x.dtype == torch.float32 and not is_compiling()
            if is_plain and x.dim() > 1 and 0 < x.numel() <= most:
                return product(x)
            found: Tensor = last(self(first(x)))
            return found

        return run

    @property
    def product(self) -> Product:
        """What multiplies; made when it is first asked for, and anew once the integers changed."""
        if is_compiling():
            return self._made()
        made = self._product
        integers = counted(self, "integers")
        key = (id(integers), version(integers), self.bias is None)
        if made is None or made[0] != key:
            self._product = made = key, self._made()
        return made[1]

    def _made(self) -> Product:
        settings = (
            self.integers,
            self.weight_scale,
            self.bias,
            self.relu,
            self.output,
        )
        return Product(self.layer, *settings)

    def forget(self) -> None:
        super().forget()
        self._product = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_product": None}  # a copy makes its own

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if any(prefix + name in state_dict for name in OF_TORCH_AO):
            raise ValueError(
                f"layer {prefix[:-1]} was saved by another engine, in torch.ao's form; "
                "quantize the float weights (float.pt) again, with quant.engine=int8"
            )
        saved = state_dict.get(f"{prefix}bias")
        if saved is not None and self.bias is None:  # a transform gave it one
            self.bias = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)
