"""What lets a run's folder stand alone, where the files that it was made from are gone."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from qtrain.common.copying import cloned
from qtrain.data.tokenizer import BPETokenizer
from qtrain.runs.checkpoint import load_weights
from qtrain.runs.report import verify

log = logging.getLogger(__name__)

NAMES_OF_FILES = ("pretrained", "checkpoint", "weights")  # arguments of models
PLAIN = (bool, int, float, str)
TOKENIZER = "tokenizer.json"

Inputs = tuple[Tensor, ...]


def without_files(
    config: Any, model: nn.Module, weights: Path, inputs: Inputs
) -> dict[str, Any]:
    """Returns the arguments with which a model is made without the files that it was made from.

    None for a file, and for all else what the model has under that name. They are
    tried out: what they make must compute the same with the saved weights.

    Args:
        config: of the model, a plain mapping with `_target_`.
        model: in eval mode.
        weights: its state dict, saved.
        inputs: forward's arguments.
    """
    named = {k: v for k, v in config.items() if k in NAMES_OF_FILES and v}
    if not named:
        return {}
    own = {k: getattr(model, k, None) for k in config if k not in named}
    found: dict[str, Any] = {k: v for k, v in own.items() if isinstance(v, PLAIN)}
    # For some `pretrained` is a switch
    found |= {k: False if v is True else None for k, v in named.items()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            made = instantiate(config | found, _convert_="all").eval()
            load_weights(made, weights)
            if torch.equal(made(*cloned(inputs)), model(*cloned(inputs))):
                return found
        reason = "it computes something else"
    # Whatever a constructor of the user's raises
    except Exception as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split())
    shown = ", ".join(f"model.{k}={v}" for k, v in named.items())
    log.warning(
        f"{shown}: will be needed to load this run; to do without, let the model have "
        f"its other arguments as attributes ({reason})"
    )
    return {}


def save_tokenizer(tokenizer: Any, run_dir: Path) -> list[str]:
    """Writes a tokenizer that comes from files into a run's folder; returns the file's name."""
    if not isinstance(tokenizer, BPETokenizer):
        return []
    tokenizer.save(run_dir / TOKENIZER)
    return [TOKENIZER]


def tokenizer_of(run_dir: Path, report: dict[str, Any]) -> str | None:
    """Returns the name of the tokenizer of a run's data; None where they have none.

    Raises:
        ValueError: the one in its folder is damaged.
    """
    if TOKENIZER in report.get("sha256", {}):
        verify(run_dir, report, TOKENIZER)
        return str(run_dir)
    data = report["config"].get("data")
    name = data.get("tokenizer") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None
