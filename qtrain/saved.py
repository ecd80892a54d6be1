"""A finished run's model, back in a fresh process."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from qtrain.checkpoint import load_weights
from qtrain.report import FILE_NAME, load_report


def load_float(run_dir: Path) -> nn.Module:
    """Returns the float model of the run in `run_dir`, in eval mode; see `load`."""
    report = _report(run_dir)
    with torch.random.fork_rng():
        model: nn.Module = instantiate(report["config"]["model"], _convert_="all")
    load_weights(model, run_dir / "float.pt")
    return model.eval()


def sample_inputs(run_dir: Path) -> tuple[Tensor, ...]:
    """Returns forward's arguments for the first test batch of the run in `run_dir`, on the CPU.

    Raises:
        ValueError: the folder holds no finished run, or its data are not there.
    """
    config = OmegaConf.create(_report(run_dir)["config"])
    config.data.device = "cpu"
    data, task = (instantiate(config[key], _convert_="all") for key in ("data", "task"))
    inputs: tuple[Tensor, ...] = task.inputs(next(iter(data.test)))
    return inputs


def _report(run_dir: Path) -> dict[str, Any]:
    report = load_report(run_dir / FILE_NAME)
    if report["status"] != "ok":
        raise ValueError(f"{run_dir}: this run failed ({report['error']}), so there is no model to load")
    return report


def load(run_dir: Path) -> nn.Module:
    """Returns the converted model of the run in `run_dir`, with predictions bit-identical to the run's.

    Its modules are made by the same prepare and convert, uncalibrated, and filled from quantized.pt, which is loaded
    with `weights_only=True`. The model's own class, named in the run's config, must be importable.

    Raises:
        ValueError: the folder holds no finished run, or its weights are damaged.
    """
    report = _report(run_dir)
    config = OmegaConf.create(report["config"])
    if report["quant"]["engine"] is not None:
        config.quant.engine = report["quant"]["engine"]  # what "auto" was where the run was made
    with torch.random.fork_rng():
        model = instantiate(config.model, _convert_="all")
        quantizer = instantiate(config.quant, _convert_="all")
        prepared = quantizer.prepare(model)
        fake = quantizer.fake(prepared) if quantizer.simulated else None
        quantized = quantizer.convert(prepared) if fake is None else fake
    load_weights(quantized, run_dir / "quantized.pt")
    return quantized
