"""What is wrong with a config: lines `key=value: what is allowed`, raised together by `build`."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.error import URLError

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import nn

from qtrain.common.validate import shown
from qtrain.config.settings import objectives
from qtrain.data.loaders import DataLoaders
from qtrain.data.tokenizer import load_tokenizer, own_tokenizer
from qtrain.exporter.judge import check_exporters
from qtrain.functional.spec import CODEBOOKS
from qtrain.task.base import Task
from qtrain.train.generators import undisturbed


def unresolved(node: Any, path: str = "") -> Iterator[str]:
    """Yields a line for each value below `node` that is missing, or leads nowhere."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        where = f"{path}{key!s}"
        try:
            child = node[key]
        except MissingMandatoryValue:
            yield f"{where}=???: must be given a value"
            continue
        except OmegaConfBaseException as err:
            raw = OmegaConf.to_container(node, resolve=False)
            yield (
                f"{where}={raw[key]}: {str(err).splitlines()[0]}; "  # type: ignore[index]
                "name a key of this config, or give a value"
            )
            continue
        if OmegaConf.is_config(child) and not OmegaConf.is_interpolation(node, key):
            yield from unresolved(child, f"{where}.")


def overridden_labels(config: DictConfig) -> list[str]:
    """Returns what is wrong with the choices that a composed config names: they label the run."""
    if not OmegaConf.is_dict(config.choices):
        return [
            f"choices={shown(config.choices)}: "
            "names the files that were chosen, and cannot be set"
        ]
    return [
        f"choices.{key}={shown(config.choices[key])}: "
        f"names the file that was chosen, and cannot be set; set {key}="
        for key in config.choices
        if not OmegaConf.is_interpolation(config.choices, key)
    ]


def spec_mistakes(quant: DictConfig, role: str) -> list[str]:
    """Returns what is wrong with `quant.weight` or `quant.activation`, by making it alone."""
    if role in quant and not OmegaConf.is_dict(quant[role]):
        given = quant[role]
        example = f"{{format: {given}}}" if given in CODEBOOKS else "{bits: 8}"
        return [f"quant.{role}={shown(given)}: must be a mapping, such as {example}"]
    for path in (role, f"{role}.observer"):
        node = OmegaConf.select(quant, path)
        if OmegaConf.is_dict(node) and "_target_" not in node:
            return [
                f"quant.{path}._target_: is missing; "
                f"it names what is made of the settings below quant.{path}"
            ]
    try:
        instantiate(quant.get(role), _convert_="all")
    except Exception as err:
        return explain(f"quant.{role}", quant[role], err)
    return []


def _other_tokenizer(config: DictConfig) -> list[str]:
    """Returns what is wrong where a pretrained model gets tokens that it was not trained on."""
    pretrained = OmegaConf.select(config, "model.pretrained")
    name = OmegaConf.select(config, "data.tokenizer")
    own = own_tokenizer(pretrained)
    if name is None or own in (name, "bytes"):
        return []
    given, needed = (load_tokenizer(of).vocab_size for of in (name, own))
    if given == needed:
        return []
    return [
        f"data.tokenizer={name}: has {given} tokens, and model.pretrained={pretrained} "
        f"was trained with a tokenizer of {needed}; use data.tokenizer=auto"
    ]


def disagreements(config: DictConfig, made: dict[str, Any], sound: bool) -> list[str]:
    """Returns why parts that are right, each by itself, cannot be used together.

    Args:
        made: the parts that could be made, by their keys in `config`.
        sound: whether nothing else is wrong; one check only makes sense then.
    """
    data, task, quantizer = (made.get(key) for key in ("data", "task", "quant"))
    lines = []
    if task is not None:
        lines += _unknown_objectives(config, task)
        lines += task.mistakes(made["model"]) if "model" in made else []
        lines += _other_tokenizer(config) if sound and not lines else []
    if data is not None:
        lines += [
            f"data: there are no {split} data; "
            "each of train and test needs a sample at least"
            for split in ("train", "test")
            if not len(getattr(data, split))
        ]
        counts_labels = not hasattr(task, "num_outputs")
        lines += (
            _too_few_classes(config, data)
            if sound and not lines and counts_labels
            else []
        )
        lines += _missing_validation(config, quantizer) if data.val is None else []
        lines += (
            _too_few_samples(config, data, quantizer) if sound and not lines else []
        )
    return lines + check_exporters(made.get("export", []), quantizer)


def _unknown_objectives(config: DictConfig, task: Task) -> list[str]:
    def is_known(path: str) -> bool:
        model, _, number = path.partition(".")
        return model in ("float", "fake", "quantized") and number in task.numbers

    return [
        f"objective={path}: allowed are size_bytes, latency_ms, or float, "
        f"fake or quantized, a dot, and one of {', '.join(task.numbers)}"
        for path in objectives(config)
        if path not in ("size_bytes", "latency_ms") and not is_known(path)
    ]


def _too_few_classes(config: DictConfig, data: DataLoaders) -> list[str]:
    if "num_classes" not in config.model:
        return []
    with undisturbed(data.train):
        labels = getattr(data.train, "labels", None)
    if labels is None:
        return []
    if labels.dim() != 1 or labels.is_floating_point():
        return []
    low, high = int(labels.min()), int(labels.max())
    needed, given = high + 1, config.model.num_classes
    # Labels that are beyond what the data state themselves are told of by their batch.
    if needed <= given or given == data.about.get("num_classes"):
        return []
    fix = "set that" if low == 0 else "count them from 0, or set that"
    return [
        f"model.num_classes={given}: the labels reach from {low} to {high}, and need "
        f"at least {needed}; {fix}"
    ]


def _too_few_samples(
    config: DictConfig, data: DataLoaders, quantizer: Any
) -> list[str]:
    wanted = getattr(quantizer, "samples", None)
    if wanted is None or not quantizer.calibrates:
        return []
    split = {"train": data.calib, "val": data.val, "test": data.test}[
        config.calib_split
    ]
    there = sum(len(batch[0]) for batch in islice(split or (), config.calib_batches))
    if there >= wanted:
        return []
    return [
        f"quant.samples={wanted}: {config.calib_batches} batches of calibration data "
        f"hold {there}; use fewer samples, a larger calib_batches or data.batch_size, "
        "a longer text or a shorter data.context"
    ]


def _missing_validation(config: DictConfig, quantizer: Any) -> list[str]:
    lines = []
    if config.calib_split == "val":
        lines.append(
            "calib_split=val: there are no validation data; "
            "set data.val_size above 0, or use train or test"
        )
    if quantizer is not None and quantizer.trains and quantizer.convert_every:
        lines.append(
            f"quant.convert_every={quantizer.convert_every}: the best epoch is chosen "
            "on validation data, and there is none; "
            "set data.val_size above 0, or quant.convert_every=0"
        )
    return lines


def refusals(
    made: dict[str, Any], section: DictConfig, prefix: str = ""
) -> list[str]:
    """Returns what is wrong with optimizer and scheduler, by calling their factories."""
    key = "optimizer"
    try:
        optimizer = made[key]([nn.Parameter(torch.zeros(1))])
        key = "scheduler"
        made[key](optimizer, 10)
    except Exception as err:
        return explain(f"{prefix}{key}", section[key], err)
    return []


def explain(key: str, section: DictConfig, err: Exception) -> list[str]:
    """Returns lines `key=value: reason` for what a constructor raised."""
    found = re.search(r"full_key: ([\w.]+)", str(err))
    where = found[1] if found else key
    cause = err.__cause__ or err
    reason = str(cause)
    if isinstance(cause, TypeError) and "required keyword-only argument" in reason:
        return [
            f"{where}.{name}: is missing, and has no default"
            for name in re.findall(r"'(\w+)'", reason)
        ]
    if isinstance(cause, TypeError) and "required positional argument" in reason:
        reason += (
            f"; what is called later with more arguments needs {where}._partial_=true"
        )
    if not isinstance(cause, ValueError | TypeError | ImportError):
        # A library's own, as an index that it lacks
        reason = f"{type(cause).__name__}: {reason}"
    own = (
        section
        if where == key
        else OmegaConf.select(section, where.removeprefix(f"{key}."))
    )
    if isinstance(cause, URLError | TimeoutError):
        reason += (
            "; what it downloads is out of reach: "
            "go online, or put the files where they would be kept"
        )
    lines = []
    for line in reason.splitlines():
        # Our own constructors begin with `parameter=value: `
        if re.match(r"[\w.*]+=", line):
            lines.append(f"{where}.{line}")
        elif line.startswith(" ") and lines:
            lines[-1] += f"\n{line}"  # a list that goes with the line before
        elif line.strip() and not line.startswith("full_key: "):
            # A library's constructor names no key: show what it was given.
            values = own.items() if OmegaConf.is_dict(own) else ()
            given = [
                f"{where}.{k!s}={shown(v)}"
                for k, v in values
                if not OmegaConf.is_config(v)
            ]
            lines.append(
                f"{where}: {line}" + (f" (given {', '.join(given)})" if given else "")
            )
    return lines or [f"{where}: {type(cause).__name__}"]
