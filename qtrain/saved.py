"""A finished run's model, back in a fresh process."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from qtrain.checkpoint import load_weights
from qtrain.report import FILE_NAME, load_report


def load(run_dir: Path) -> nn.Module:
    """Returns the converted model of the run in `run_dir`, with predictions bit-identical to the run's.

    Its modules are made by the same prepare and convert, uncalibrated, and filled from quantized.pt, which is loaded
    with `weights_only=True`. The model's own class, named in the run's config, must be importable.

    Raises:
        ValueError: the folder holds no finished run, or its weights are damaged.
    """
    report = load_report(run_dir / FILE_NAME)
    if report["status"] != "ok":
        raise ValueError(f"{run_dir}: this run failed ({report['error']}), so there is no model to load")
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
