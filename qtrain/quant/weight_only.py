"""Weight-only quantization: integers are stored, floats are computed with; no calibration."""

from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.packed.compact import CompactEmbedding, CompactLinear
from qtrain.backend.packed.weight import HalfWeight, IntegerWeight
from qtrain.common.validate import choice, refuse
from qtrain.functional.spec import QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_format import layer_format, read_settings, settings_of, settle
from qtrain.simulate.simulation import Simulation

EMBEDDINGS = ("float", "fp16", "int8", "int4")
HEADS = ("shared", "separate", "float")

WEIGHT = QuantSpec()


class WeightOnly(Quantizer):
    """Stores the weights of Linear and, if asked, Embedding layers in fewer bits.

    Args:
        weight: bits 8, 4 or 2; granularity per_channel (auto), per_tensor or per_group; symmetric (auto) or not.
        embedding: how embeddings are stored: "float", "fp16", or "int8" and "int4" with one scale a row.
        head: a Linear layer whose weight is an embedding's, as in GPT-2: "shared" stays one with it, in the
            embedding's format; "separate" becomes a weight of its own, in `weight`'s; "float" stays in float32. With a
            setting of its own in `layers` it is separate.
        layers: {pattern of layer names: what these are instead, see `layer_format`: "float", "fp16", {"bits": 4} ...}.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    weight: QuantSpec

    def __init__(
        self,
        *,
        weight: QuantSpec = WEIGHT,
        embedding: str = "float",
        head: str = "shared",
        layers: dict[str, Any] | None = None,
    ) -> None:
        problems = choice("embedding", embedding, EMBEDDINGS) + choice("head", head, HEADS)
        try:
            self.weight = settle(weight)
        except ValueError as err:
            problems += [f"weight.{line}" for line in str(err).splitlines()]
        else:
            try:
                self.layers = read_settings(
                    layers if layers is not None else {},
                    lambda pattern, value: layer_format(pattern, value, weight),
                )
            except ValueError as err:
                problems.append(str(err))
        refuse(problems)
        self.embedding, self.head = embedding, head

    def make_linear(self, layer: nn.Linear) -> nn.Module:
        """Returns what takes the place of a float layer that has no setting of its own."""
        return CompactLinear(IntegerWeight(layer.weight, self.weight), layer.bias)

    def convert(self, simulation: Simulation) -> nn.Module:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        own = settings_of(model, self.layers)
        compact: dict[int, IntegerWeight | HalfWeight] = {}
        tied = set()
        layers = [(n, m) for n, m in model.named_modules() if type(m) in (nn.Embedding, nn.Linear)]
        for name, layer in sorted(layers, key=lambda item: type(item[1]) is nn.Linear):  # embeddings first
            weight: Any = layer.weight
            if type(layer) is nn.Embedding:
                tied.add(id(weight))
                if self.embedding != "float" and own.get(name, ...) is not None:
                    compact[id(weight)] = self._embedding_weight(weight)
                    model.set_submodule(name, CompactEmbedding(compact[id(weight)]))
                continue
            assert isinstance(layer, nn.Linear)
            make = own.get(name, self.make_linear)
            is_head = id(weight) in tied and name not in own
            if make is None or is_head and self.head == "float":
                continue
            if is_head and self.head == "shared":
                if id(weight) in compact:
                    model.set_submodule(name, CompactLinear(compact[id(weight)], layer.bias))
                continue
            try:
                model.set_submodule(name, make(layer))
            except ValueError as err:
                raise ValueError(f"quant.{'layers: ' if name in own else 'weight.'}{err} (layer {name})") from err
        return model

    def _embedding_weight(self, weight: nn.Parameter) -> IntegerWeight | HalfWeight:
        if self.embedding == "fp16":
            return HalfWeight(weight)
        bits = int(self.embedding.removeprefix("int"))
        return IntegerWeight(weight, QuantSpec(bits=bits, symmetric=True, granularity="per_channel"))

    def fake(self, simulation: Simulation) -> nn.Module | None:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        for name, layer in self.convert(simulation).named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, IntegerWeight | HalfWeight):
                model.get_submodule(name).weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return model

    def reference(self, simulation: Simulation) -> nn.Module | None:
        return torch_ao.copy_model(simulation.model).cpu().eval()
