"""Settings of the command line that have no effect: lines `key=value: why; leave it out`."""

import re

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.backend.packed.embeddings import tied_heads
from qtrain.common.validate import shown
from qtrain.model.pretrained import OWN


def unused_settings(config: DictConfig, overrides: list[str]) -> list[str]:
    """Returns what is wrong where the command line sets what another of its settings makes void."""
    given = {
        text.lstrip("+").partition("=")[0]: text.lstrip("+") for text in overrides
    }
    lines = []
    for part in ("valid", "test"):
        share = f"data.{part.removesuffix('id')}_fraction"
        path = OmegaConf.select(config, f"data.{part}_path")
        if path is not None and share in given:
            lines.append(
                f"{given[share]}: that text is data.{part}_path={shown(path)}, whole; "
                "leave it out"
            )
    pretrained = OmegaConf.select(config, "model.pretrained")
    for size in OWN if isinstance(pretrained, str) else ():
        if f"model.{size}" in given:
            lines.append(
                f"{given[f'model.{size}']}: "
                f"model.pretrained={shown(pretrained)} has its own; leave it out"
            )
    return lines + _uncalibrated(config, overrides)


def unused_policies(model: nn.Module, overrides: list[str]) -> list[str]:
    """Returns what is wrong where the command line sets what the model has nothing for."""
    given = [text.lstrip("+") for text in overrides]
    has_table = any(type(module) is nn.Embedding for module in model.modules())
    lines = []
    if not has_table:
        lines += [
            f"{text}: {type(model).__name__} has no Embedding; leave it out"
            for text in given
            if re.match(r"quant\.embedding=(?!float$)", text)
        ]
    if not tied_heads(model):
        lines += [
            f"{text}: {type(model).__name__} has no Linear layer whose weight is an "
            "Embedding's; leave it out"
            for text in given
            if text.startswith("quant.head=")
        ]
    return lines


def _uncalibrated(config: DictConfig, overrides: list[str]) -> list[str]:
    try:
        always = getattr(get_object(config.quant._target_), "calibrates", True)
        calibrates = always or bool(config.quant.get("transforms"))
    except Exception:  # whatever is wrong with the name, `build` tells
        return []
    given = [
        override.lstrip("+")
        for override in overrides
        if re.match(r"\+*calib_(batches|split)=", override)
    ]
    return (
        []
        if calibrates
        else [
            f"{o}: quant={config.choices.quant} does not calibrate; leave it out"
            for o in given
        ]
    )
