"""Adapters in a file of their own, and the base that they belong to."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend.packed.lora import LoRALinear

FILE = "adapters.pt"
ENDS = (".lora_a", ".lora_b")


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns {name: layer with an adapter}."""
    found = model.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, LoRALinear)}


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """Returns what a file of adapters holds: their tensors, scales, and a digest of each tensor
    of the base.
    """
    own = {k: v for k, v in model.state_dict().items() if k.endswith(ENDS)}
    scaling = {name: layer.scaling for name, layer in adapters_of(model).items()}
    return {"adapters": own, "scaling": scaling, "base": _digests(model)}


def load_adapters(model: nn.Module, path: Path) -> None:
    """Puts the adapters of a file into a model that has such, in place.

    Raises:
        ValueError: the file is none of adapters, or they are of other layers, of
            another r or alpha, or of another base.
    """
    where = f"quant.adapters={path}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors, scaling, base = (state[k] for k in ("adapters", "scaling", "base"))
    except Exception as err:  # bytes that are no pickle can raise anything
        raise ValueError(
            f"{where}: not a readable file of adapters; "
            f"name the {FILE} of a run of quant=lora or quant=qlora"
        ) from err
    own = adapter_state(model)
    _refuse_others(
        where, "trained on other layers", scaling, own["scaling"], "targets"
    )
    for name, tensor in own["adapters"].items():
        there = tensors.get(name)
        if not isinstance(there, Tensor) or there.shape != tensor.shape:
            shape = None if not isinstance(there, Tensor) else tuple(there.shape)
            raise ValueError(
                f"{where}: {name} is {shape} there and {tuple(tensor.shape)} here; "
                "set quant.r to that of its run"
            )
    for name, scale in own["scaling"].items():
        if scaling[name] != scale:
            raise ValueError(
                f"{where}: layer {name} is scaled by {scaling[name]:g} there and by "
                f"{scale:g} here; set quant.alpha to that of its run"
            )
    _refuse_others(where, "of another base", base, own["base"], "base")
    for name, digest in own["base"].items():
        if base[name] != digest:
            raise ValueError(
                f"{where}: of another base: its {name} differs from this model's; "
                "use the base (checkpoint, data, seed, quant.weight) of its run"
            )
    model.load_state_dict(tensors, strict=False)


def _refuse_others(
    where: str,
    what: str,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    key: str,
) -> None:
    for name in sorted(theirs.keys() ^ ours.keys()):
        place = "there" if name in theirs else "here"
        raise ValueError(
            f"{where}: {what}: {name} is only {place}; set quant.{key} and all else "
            "as in its run"
            if key == "targets"
            else f"{where}: {what}: {name} is only {place}; "
            "use the model and the quant.weight of its run"
        )


def _digests(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(ENDS):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
    return found
