"""What other libraries make of a float model in int8, for bench_capture.py.

Each returns its model, and how many multiply-accumulates of layers are of integers.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import fx as fx_graph
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.backend.integers import quantized_weight
from qtrain.backend.torch_ao import use_engine

# Which argument is the weight
PRODUCTS = {
    "aten::addmm": 2,
    "aten::bmm": 1,
    "aten::convolution": 1,
    "aten::linear": 1,
    "aten::mm": 1,
}
Peer = Callable[[nn.Module, Tensor], tuple[nn.Module, int]]


def fx(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """torch's FX mode."""
    with use_engine("x86"):
        mapping = get_default_qconfig_mapping("x86")
        prepared = prepare_fx(copy.deepcopy(model), mapping, (images,))
        prepared(images)
        converted = convert_fx(prepared)
    return converted, int8_products(converted, images)


def nncf(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """NNCF's PTQ, a model of fake quantizations; products are counted by their weights'."""
    import nncf

    data = nncf.Dataset([images])
    made = nncf.quantize(copy.deepcopy(model), data, subset_size=1)
    found = Products()
    for name, quantizer in made.named_modules():
        # Of the second operand
        if name.startswith("__nncf_hooks.pre_hooks.") and name.endswith("__1.0"):
            quantizer.register_forward_hook(lambda *call: found.note(call[-1]))
    with found, torch.no_grad():
        made(images)
    return made, found.count


def torchao(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """torchao's PT2E for x86, run without the compiler."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(copy.deepcopy(model), (images,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    prepared(images)
    converted = convert_pt2e(prepared)
    runs = Runs(converted)
    with torch.no_grad():
        runs.run(images)
    return converted, runs.count


PEERS: dict[str, Peer] = {"nncf": nncf, "torchao": torchao}


class Products(TorchDispatchMode):
    """Counts the multiply-accumulates with the weights that were noted."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}
        self.count = 0

    def note(self, weight: Tensor) -> None:
        # Held, so that no other tensor comes to lie there
        self.weights[weight.untyped_storage().data_ptr()] = weight

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        place = PRODUCTS.get(func.name())
        if place is not None:
            weight = args[place]
            if weight.untyped_storage().data_ptr() in self.weights:
                if func.name().endswith("mm"):  # it lies the other way
                    self.count += output.numel() * weight.shape[-2]
                else:
                    self.count += macs(output, weight)
        return output


class Runs(fx_graph.Interpreter):
    """Runs a graph, and counts the multiply-accumulates of integers on both sides."""

    def __init__(self, model: fx_graph.GraphModule) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.count = 0

    def run_node(self, n: fx_graph.Node) -> Any:
        output = super().run_node(n)
        if str(n.target).startswith(("aten.conv", "aten.linear")):
            operands: Any = n.args[:2]
            if all("dequantize" in str(operand.target) for operand in operands):
                self.count += macs(output, self.env[operands[1]])
        return output


def all_products(model: nn.Module, images: Tensor) -> int:
    """Returns the multiply-accumulates with the parameters of a float model."""
    found = Products()
    for parameter in model.parameters():
        found.note(parameter)
    with found, torch.enable_grad():  # in which attention takes no short cut
        model(images)
    return found.count


def int8_products(model: nn.Module, images: Tensor) -> int:
    """Returns the multiply-accumulates of layers with an integer weight."""
    counts: list[int] = []

    def count(layer: Any, inputs: Any, output: Any) -> None:
        counts.append(macs(output, quantized_weight(layer)))

    handles = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if len(getattr(quantized_weight(layer), "shape", ())) > 1
        and not isinstance(layer, nn.Embedding)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return sum(counts)


def macs(output: Any, weight: Any) -> int:
    return int(output.numel() * weight.shape[1:].numel())
