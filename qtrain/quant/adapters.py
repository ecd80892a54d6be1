"""Adapters in a file of their own, and the base that they belong to."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain.backend.packed.lora import LoRALinear
from qtrain.functional.finite import is_finite

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


def load_adapters(
    model: nn.Module, path: Path, *, is_rehearsal: bool = False
) -> None:
    """Puts the adapters of a file into a model that has such, in place.

    Args:
        is_rehearsal: the base is not trained yet, so that its digests say nothing.

    Raises:
        ValueError: the file is none of adapters, or they are of other layers, of
            another r or alpha, not finite, or of another base.
    """
    where = f"quant.adapters={path}"
    theirs, own = _read(where, path), adapter_state(model)
    tensors, scaling = theirs["adapters"], theirs["scaling"]
    _refuse_others(
        f"{where}: trained on other layers",
        {**scaling, **tensors},
        {**own["scaling"], **own["adapters"]},
        "set quant.targets and all else as in its run",
    )
    for name, tensor in own["adapters"].items():
        _refuse_shape(where, name, tensors[name].shape, tensor.shape)
        if not is_finite(tensors[name]):
            raise ValueError(
                f"{where}: {name} has NaN or infinite numbers; "
                "train it again, with a smaller quant.optimizer.lr"
            )
    for name, scale in own["scaling"].items():
        if scaling[name] != scale:
            raise ValueError(
                f"{where}: layer {name} is scaled by {scaling[name]:g} there and by "
                f"{scale:g} here; set quant.alpha to that of its run"
            )
    another = f"{where}: of another base"
    _refuse_others(
        another,
        theirs["base"],
        own["base"],
        "use the model and quant.weight of its run",
    )
    for name, digest in own["base"].items():
        if theirs["base"][name] != digest and not is_rehearsal:
            raise ValueError(
                f"{another}: its {name} differs from this model's; "
                "use the base (checkpoint, data, seed, quant.weight) of its run"
            )
    model.load_state_dict(tensors, strict=False)


def _read(where: str, path: Path) -> dict[str, dict[str, Any]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: {**state[key]} for key in ("adapters", "scaling", "base")}
        found["scaling"] = {k: float(v) for k, v in found["scaling"].items()}
        if not all(x.is_floating_point() for x in found["adapters"].values()):
            raise TypeError("adapters are floats")
    except Exception as err:  # bytes that are no pickle can raise anything
        raise ValueError(
            f"{where}: not a readable file of adapters; "
            f"name the {FILE} of a run of quant=lora or quant=qlora"
        ) from err
    return found


def _refuse_others(
    what: str, theirs: dict[str, Any], ours: dict[str, Any], remedy: str
) -> None:
    for name in sorted(theirs.keys() ^ ours.keys(), key=str):
        place = "there" if name in theirs else "here"
        raise ValueError(f"{what}: {name} is only {place}; {remedy}")


def _refuse_shape(where: str, name: str, there: torch.Size, here: torch.Size) -> None:
    if there != here:
        is_rank = name.endswith(ENDS[0]) and there[:1] != here[:1]
        raise ValueError(
            f"{where}: {name} is {tuple(there)} there and {tuple(here)} here; "
            f"{'set quant.r to that' if is_rank else 'use the model'} of its run"
        )


def _digests(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(ENDS):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
    return found
