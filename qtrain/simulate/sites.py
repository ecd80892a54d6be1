"""Layers of a simulation: each computes in float what a layer on integers will mean.

A site owns the parameters of the layer that it stands for, under the same names, and
up to two fake quantizations: `weight_q` of its weight, `output_q` of its output. The
same class serves PTQ, in eval mode, and QAT, in train mode. Like torch's layers, they
take what they work on by place or as `input=`.

Whether a kernel runs it, or float between conversions, is a backend's affair: both
compute this.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.simulate import batch_norm
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.product import product


class Site(nn.Module):
    """A place of the model where something is quantized.

    Args:
        weight_q: the fake quantization of its weight; None: it has none, or it stays
            float.
        output_q: the fake quantization of its output; None: it stays float.
    """

    weight_q: FakeQuantize | None
    output_q: FakeQuantize | None
    kind = ""  # what it stands for, as users know it: "Conv2d"

    def __init__(
        self,
        *,
        weight_q: FakeQuantize | None = None,
        output_q: FakeQuantize | None = None,
    ) -> None:
        super().__init__()
        self.register_module("weight_q", weight_q)
        self.register_module("output_q", output_q)

    def quantized_output(self, x: Tensor) -> Tensor:
        """Returns `x` as its integers will mean it."""
        # Past nn.Module's attributes, which are slow
        output_q = self._modules["output_q"]
        return x if output_q is None else output_q(x)

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Returns `weight` as its integers will mean it."""
        weight_q = self._modules["weight_q"]
        return weight if weight_q is None else weight_q(weight)


class QuantInput(Site):
    """Where a tensor becomes quantized: what stands for a QuantStub."""

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized_output(x)


class QuantOutput(nn.Module):
    """Where it becomes float again: stands for a DeQuantStub. No site: nothing is quantized."""

    kind = "DeQuantStub"

    def forward(self, x: Tensor) -> Tensor:
        return x


class QuantModule(Site):
    """Any module without a weight that could be quantized, with an output of its own.

    Args:
        layer: the float module; of several outputs, as of attention, the first goes
            on quantized.
    """

    def __init__(self, layer: nn.Module, *, output_q: FakeQuantize | None) -> None:
        super().__init__(output_q=output_q)
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple):
            return self.quantized_output(output[0]), *output[1:]
        return self.quantized_output(output)


class Functional:
    """The methods of a FloatFunctional, for the user's forward; subclasses treat the results."""

    def _output(self, op: str, value: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._output("add", torch.add(x, y))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._output("add_relu", F.relu(torch.add(x, y)))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._output("mul", torch.mul(x, y))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._output("matmul", torch.matmul(x, y))

    def cat(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        return self._output("cat", torch.cat(tensors, dim))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.add(x, y)  # its kernel works the scale out of that of x

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.mul(x, y)


class QuantFunctional(Functional, Site):
    """Stands for a FloatFunctional, under its name; its first call tells which method it serves.

    Attributes:
        ops: the names of the methods that were called; one scale serves them all.
    """

    def __init__(self, *, output_q: FakeQuantize | None) -> None:
        super().__init__(output_q=output_q)
        self.ops: set[str] = set()

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("call a method of it, such as add")

    def _output(self, op: str, value: Tensor) -> Tensor:
        self.ops.add(op)
        return self.quantized_output(value)


class QuantEmbedding(Site):
    """Rows of a table, which may be quantized.

    Args:
        layer: the float embedding; its weight becomes this site's.

    Shapes: input, int64 (...) -> (..., embedding_dim).
    """

    def __init__(
        self,
        layer: nn.Embedding,
        *,
        weight_q: FakeQuantize | None,
        output_q: FakeQuantize | None,
    ) -> None:
        super().__init__(weight_q=weight_q, output_q=output_q)
        self.weight = layer.weight
        self.padding_idx = layer.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(
            input, self.quantized_weight(self.weight), self.padding_idx
        )
        return self.quantized_output(rows)


class QuantWeighted(Site):
    """A Linear layer, convolution or transposed convolution; behind it maybe batch-norm, and ReLU.

    In train mode batch-norm trains by `batch_norm.TRAINING[conv_bn]`; in eval mode,
    and where it is frozen, it is folded into weight and bias, as inference has it.

    Args:
        layer: the float layer; its weight and bias become this site's.
        bn: the batch-norm behind it.
        relu: whether a ReLU follows.
        conv_bn: "folded" or "exact".

    Attributes:
        frozen: whether batch-norm's statistics stand still in train mode too.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        layer: Any,
        *,
        bn: nn.Module | None = None,
        relu: bool = False,
        conv_bn: str = "folded",
        weight_q: FakeQuantize | None,
        output_q: FakeQuantize | None,
    ) -> None:
        super().__init__(weight_q=weight_q, output_q=output_q)
        self.register_parameter("weight", _taken(layer, "weight"))
        self.register_parameter("bias", _taken(layer, "bias"))
        self.layer = layer  # without parameters: it says what is done with them
        self.register_module("bn", bn)
        self.relu = relu
        self.conv_bn = conv_bn
        self.frozen = False
        self.fuses_relu = relu and output_q is not None
        if output_q is not None and relu:
            # One clamp, and one mask for the gradient, do the work of two.
            output_q.fuse_relu = True

    def forward(self, input: Tensor) -> Tensor:
        bn = self._modules["bn"]
        if bn is not None and bn.training:
            output = batch_norm.TRAINING[self.conv_bn](self, input)
        else:
            weight, bias = self.folded()
            output = self.product(input, self.quantized_weight(weight), bias)
        if self.relu and not self.fuses_relu:
            output = F.relu(output)
        return self.quantized_output(output)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns what the layer puts out with this weight and bias, before batch-norm and ReLU."""
        return product(self.layer, x, weight, bias)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias as inference has them: batch-norm within, nothing quantized."""
        bn: Any = self.bn
        if bn is None:
            return self.weight, self.bias
        factor = batch_norm.running_factor(bn)
        mean = bn.running_mean if self.bias is None else bn.running_mean - self.bias
        spread = batch_norm.along_outputs(factor, self.layer, self.weight)
        return self.weight * spread, bn.bias - factor * mean

    def set_weight(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replaces the weight, and the bias if given, without writing to it: it may be tied."""
        self.weight = _like(self.weight, weight)
        if bias is not None:
            self.bias = _like(self.bias, bias)

    def shift_bias(self, by: Tensor) -> None:
        """Adds `by`, one number a channel, to inference's bias; a new parameter holds the sum."""
        owner: Any = self if self.bn is None else self.bn
        owner.bias = _like(owner.bias, by if owner.bias is None else owner.bias + by)

    def freeze(self, frozen: bool = True) -> None:
        """Lets batch-norm's statistics stand still until told otherwise, even in `train()`."""
        self.frozen = frozen
        self.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}bias")
        if saved is not None and self.bias is None:  # a transform gave it one
            self.bias = nn.Parameter(torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> "QuantWeighted":
        super().train(mode)
        bn = self._modules["bn"]
        if self.frozen and bn is not None:
            bn.eval()
        return self


def _taken(layer: nn.Module, name: str) -> nn.Parameter | None:
    """Returns a parameter taken from `layer`; a parametrization may have left a plain tensor."""
    value = getattr(layer, name)
    delattr(layer, name)
    layer.register_parameter(name, None)  # which its repr asks for
    is_parameter = value is None or isinstance(value, nn.Parameter)
    return value if is_parameter else nn.Parameter(value.detach())


def _like(old: nn.Parameter | None, value: Tensor) -> nn.Parameter:
    """Returns a parameter of that value, which is trained where the old one is."""
    return nn.Parameter(
        value.detach().clone(), requires_grad=old is None or old.requires_grad
    )
