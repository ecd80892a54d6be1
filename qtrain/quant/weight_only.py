"""Weight-only quantization: integers are stored, floats are computed with; no calibration."""

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from qtrain import eager
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.layer.compact import CompactEmbedding, CompactLinear
from qtrain.layer.weight import HalfWeight, IntegerWeight
from qtrain.quant.base import Quantizer

EMBEDDINGS = ("float", "fp16", "int8", "int4")
HEADS = ("shared", "separate", "float")


class WeightOnly(Quantizer):
    """Stores the weights of Linear and, if asked, Embedding layers in fewer bits.

    Args:
        weight: bits 8, 4 or 2; granularity per_channel (auto), per_tensor or per_group; symmetric (auto) or not.
        embedding: how embeddings are stored: "float", "fp16", or "int8" and "int4" with one scale a row.
        head: a Linear layer whose weight is an embedding's, as in GPT-2: "shared" stays one with it, in the
            embedding's format; "separate" becomes a weight of its own, in `weight`'s; "float" stays in float32.
        layers: {pattern of layer names: "float", or the fields of `weight` that differ there, as {"bits": 4}}.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    weight: QuantSpec

    def __init__(
        self, *, weight: QuantSpec, embedding: str, head: str, layers: dict[str, str | dict[str, Any]]
    ) -> None:
        problems = []
        if embedding not in EMBEDDINGS:
            problems.append(f"embedding={embedding}: allowed are {', '.join(EMBEDDINGS)}")
        if head not in HEADS:
            problems.append(f"head={head}: allowed are {', '.join(HEADS)}")
        try:
            self.weight = settle(weight)
        except ValueError as err:
            problems += [f"weight.{line}" for line in str(err).splitlines()]
        if problems:
            raise ValueError("\n".join(problems))
        self.embedding, self.head = embedding, head
        self.layers = {pattern: self._layer_weight(pattern, setting) for pattern, setting in layers.items()}

    def _layer_weight(self, pattern: str, setting: str | dict[str, Any]) -> QuantSpec | None:
        if setting == "float":
            return None
        if not isinstance(setting, dict):
            raise ValueError(f"layers.{pattern}={setting}: must be float, or fields of weight such as {{bits: 4}}")
        try:
            return settle(replace(self.weight, **setting))
        except (TypeError, ValueError) as err:
            raise ValueError(f"layers.{pattern}.{err}") from err

    def make_linear(self, layer: nn.Linear, spec: QuantSpec) -> nn.Module:
        """Returns what takes the place of a float layer."""
        return CompactLinear(IntegerWeight(layer.weight, spec), layer.bias)

    def convert(self, prepared: nn.Module) -> nn.Module:
        model = copy.deepcopy(prepared).cpu().eval()
        own = eager.match_layers(model, self.layers)

        def spec_of(name: str) -> QuantSpec | None:
            found = [n for n in own if name == n or name.startswith(f"{n}.")]
            return own[max(found, key=len)] if found else self.weight

        compact: dict[int, IntegerWeight | HalfWeight] = {}
        tied = {}
        layers = [(n, m) for n, m in model.named_modules() if type(m) in (nn.Embedding, nn.Linear)]
        for name, layer in sorted(layers, key=lambda item: type(item[1]) is nn.Linear):  # embeddings first
            weight: Any = layer.weight
            if type(layer) is nn.Embedding:
                tied[id(weight)] = name
                if self.embedding != "float" and spec_of(name) is not None:
                    compact[id(weight)] = self._embedding_weight(weight)
                    model.set_submodule(name, CompactEmbedding(compact[id(weight)]))
                continue
            assert isinstance(layer, nn.Linear)
            spec = spec_of(name)
            is_head = id(weight) in tied
            if spec is None or is_head and self.head == "float":
                continue
            if is_head and self.head == "shared":
                if id(weight) in compact:
                    model.set_submodule(name, CompactLinear(compact[id(weight)], layer.bias))
                continue
            try:
                model.set_submodule(name, self.make_linear(layer, spec))
            except ValueError as err:
                raise ValueError(f"quant.weight.{err} (layer {name})") from err
        return model

    def _embedding_weight(self, weight: nn.Parameter) -> IntegerWeight | HalfWeight:
        if self.embedding == "fp16":
            return HalfWeight(weight)
        bits = int(self.embedding.removeprefix("int"))
        return IntegerWeight(weight, QuantSpec(bits=bits, symmetric=True, granularity="per_channel"))

    def fake(self, prepared: nn.Module) -> nn.Module | None:
        model = copy.deepcopy(prepared).cpu().eval()
        for name, layer in self.convert(prepared).named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, IntegerWeight | HalfWeight):
                model.get_submodule(name).weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return model

    def reference(self, prepared: nn.Module) -> nn.Module | None:
        return copy.deepcopy(prepared).cpu().eval()


def settle(weight: QuantSpec) -> QuantSpec:
    """Returns the spec with every "auto" replaced: symmetric, per channel.

    Raises:
        ValueError: a field has no packed format; gives the legal choices.
    """
    problems = []
    if weight.bits not in (2, 4, 8):
        problems.append(f"bits={weight.bits}: packed are 2, 4 and 8")
    if weight.reduce_range is True:
        problems.append("reduce_range=true: is for activations; leave it at auto")
    if weight.observer is not None:
        name = weight.describe()["observer"]
        problems.append(f"observer={name}: weights are taken by their minimum and maximum; leave it at null")
    if problems:
        raise ValueError("\n".join(problems))
    return replace(
        weight,
        symmetric=True if weight.symmetric == AUTO else weight.symmetric,
        granularity="per_channel" if weight.granularity == AUTO else weight.granularity,
        reduce_range=False,
    )
