"""GPT-2 or Llama as a GGUF file, which llama.cpp runs: weights, sizes and
tokenizer in one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtrain.backend.packed.lora import LoRALinear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.common import gguf
from qtrain.common.files import write_atomically
from qtrain.common.validate import choice, refuse
from qtrain.data.gguf import describe
from qtrain.data.tokenizer import load_tokenizer
from qtrain.exporter.base import Exporter, Inputs
from qtrain.model import gguf as layouts
from qtrain.model.gpt2 import GPT2
from qtrain.model.llama import Llama
from qtrain.simulate.simulation import Simulation

# As the file says which type most of it has.
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8}
BLOCK = 32  # weights of a row that share a scale
NORMS = {GPT2: nn.LayerNorm, Llama: nn.RMSNorm}


class Gguf(Exporter):
    """Writes model.gguf. Weights that are integers already stay these
    where a type holds them.

    Those of up to 4 bits, symmetric, in groups of a multiple of 32, are
    Q4_0; of 8 bits Q8_0. All other weights of Linear layers and the
    token embedding become `type`; the rest is F32.

    Args:
        type: "f32", "f16", "q8_0", "q5_0", "q4_1" or "q4_0".
        tokenizer: as of `load_tokenizer`: the one that the model was
            trained with.

    Raises:
        ValueError: there is no such type.
    """

    name = "gguf"
    file_name = "model.gguf"
    writes_weights = True

    def __init__(self, *, type: str = "q8_0", tokenizer: str = "bytes") -> None:
        refuse(choice("type", type, TYPES))
        self.type, self.tokenizer = type, tokenizer

    def step(self, simulation: Simulation, inputs: Inputs, output: Any) -> float:
        return float(output.std())  # of logits, for nothing here has steps

    def write(self, simulation: Simulation, example: Inputs, path: Path) -> None:
        if any(layer.output is not None for layer in simulation.plan.values()):
            raise ValueError(
                "export: a GGUF file holds quantized weights alone, and this method "
                "quantizes activations too; use weight_only, gptq, awq or none"
            )
        self.write_model(simulation.model, path)

    def write_model(self, model: Any, path: Path) -> None:
        """Writes a float or converted GPT2 or Llama.

        Raises:
            ValueError: it is none, or none that llama.cpp knows; or
                `type` has no room for it.
        """
        _refuse_others(model)
        library = gguf.library("export")
        described = describe(load_tokenizer(self.tokenizer), model.vocab_size)
        layout = layouts.LLAMA if isinstance(model, Llama) else layouts.GPT2
        writer = library.GGUFWriter(None, layout.architecture)
        numbers = {**layout.sizes, "n_inner": "feed_forward_length"}
        for ours, theirs in numbers.items():
            writer.add_uint32(f"{layout.architecture}.{theirs}", getattr(model, ours))
        writer.add_float32(f"{layout.architecture}.{layout.epsilon}", model.ln_f.eps)
        if isinstance(model, Llama):
            writer.add_rope_dimension_count(model.n_embd // model.n_head)
            writer.add_rope_freq_base(model.rope_theta)
        writer.add_file_type(TYPES[self.type])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(described["rule"])
        writer.add_token_list(described["tokens"])
        writer.add_token_types(described["kinds"])
        writer.add_token_merges(described["merges"])
        writer.add_bos_token_id(described["end"])
        writer.add_eos_token_id(described["end"])
        writer.add_add_bos_token(False)
        for ours, theirs in layout.names(model.n_layer).items():
            self._add(writer, library, model, ours, theirs)

        def fill(new: Path) -> None:
            writer.write_header_to_file(new)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        write_atomically(path, fill)

    def _add(
        self, writer: Any, library: Any, model: Any, ours: str, theirs: str
    ) -> None:
        layer = model.get_submodule(ours)
        if isinstance(layer, LoRALinear):
            layer = layer.merged()  # the format knows no adapters
        if ours == "lm_head" and layer.weight is model.wte.weight:
            return  # llama.cpp takes the embedding then
        is_norm = isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        is_matrix = ours != "wpe" and not is_norm
        kind = library.GGMLQuantizationType[self.type.upper() if is_matrix else "F32"]
        weight = layer.weight
        raw = _as_they_are(weight) if is_matrix else None
        if raw is not None:
            kind = library.GGMLQuantizationType[raw[0]]
            data = raw[1]
        else:
            values = weight if isinstance(weight, Tensor) else weight.dequantize()
            data = _quantized(library, values, kind, ours)
        order = layouts.row_order(ours, vars(model))
        data = data if order is None else data[order.numpy()]
        writer.add_tensor(f"{theirs}.weight", data, raw_dtype=kind)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            writer.add_tensor(f"{theirs}.bias", bias.detach().float().numpy())

    def run(self, path: Path, inputs: Inputs) -> Any:
        reader = gguf.read(str(path), "export")
        architecture = gguf.value(reader, "general.architecture")
        kind = Llama if architecture == layouts.LLAMA.architecture else GPT2
        model = kind(pretrained=str(path)).eval()
        with torch.no_grad():
            return model(*inputs)


def _refuse_others(model: Any) -> None:
    norms = [norm for kind, norm in NORMS.items() if isinstance(model, kind)]
    if not norms:
        raise ValueError(
            "export: only GPT-2 and Llama are written as GGUF, "
            f"and this is a {type(model).__name__}"
        )
    if not isinstance(model.ln_f, norms[0]):
        raise ValueError(
            "export: llama.cpp's GPT-2 has LayerNorm, and this one was rotated; "
            "leave rotate out of quant.transforms"
        )
    if isinstance(model, GPT2) and isinstance(model.lm_head, LoRALinear):
        raise ValueError(
            "export: a GPT-2 is read again with its embedding as its head, and this "
            "head has an adapter; leave lm_head out of quant.targets"
        )


def _quantized(library: Any, values: Tensor, kind: Any, name: str) -> Any:
    columns = values.shape[-1]
    if kind.name.startswith("Q") and columns % BLOCK:
        raise ValueError(
            f"export: type={kind.name.lower()} has blocks of {BLOCK}, and the rows of "
            f"layer {name} have {columns} numbers; "
            f"use type=f16 or a model.n_embd that {BLOCK} divides"
        )
    return library.quants.quantize(values.detach().float().numpy(), kind)


def _as_they_are(weight: Any) -> tuple[str, Any] | None:
    """Returns (type, bytes) of integers that a type holds as they are, but
    for float16 scales.
    """
    if not isinstance(weight, IntegerWeight) or not weight.signed:
        return None
    rows, columns = weight.shape
    groups = weight.scale.shape[-1] if weight.scale.dim() else 1
    if columns % BLOCK or columns // groups % BLOCK:
        return None
    integers = weight.int_repr()
    scale = weight.scale.float().expand(rows, groups)
    scale = scale.repeat_interleave(
        columns // BLOCK // groups, 1
    ).half()  # one a block
    blocks = integers.view(rows, -1, BLOCK)
    if weight.bits == 8:
        kind, codes = "Q8_0", blocks.view(torch.uint8)
    else:
        low, high = (blocks + 8).to(torch.uint8).chunk(2, -1)
        kind, codes = "Q4_0", low | high << 4
    data = torch.cat([scale[..., None].view(torch.uint8), codes], -1)
    return kind, np.ascontiguousarray(data.flatten(1).numpy())
