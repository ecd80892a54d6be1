"""From YAML to objects: how the config is composed, checked and built."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.analyze.truth import TruthGate
from qtrain.common.network import impatient
from qtrain.common.validate import SEEDS, choice, whole
from qtrain.config.auto import AUTO, settle
from qtrain.config.command_line import NAMED, config_dir, hydra_arguments
from qtrain.config.mistakes import (
    disagreements,
    explain,
    refusals,
    spec_mistakes,
    unresolved,
)
from qtrain.config.old_names import up_to_date
from qtrain.config.settings import (
    ConfigError,
    check_settings,
    check_targets,
    find_device,
    refuse_config,
)
from qtrain.config.together import partners
from qtrain.data.loaders import DataLoaders
from qtrain.data.tokenizer import own_tokenizer
from qtrain.exporter.base import Exporter
from qtrain.quant.base import Quantizer
from qtrain.task.base import Task
from qtrain.train.trainer import OptimizerFactory, SchedulerFactory, Trainer

PATHS = (
    "checkpoint",
    "float_cache",
    "data.path",
    "data.valid_path",
    "data.test_path",
    "data.root",
    "data.cache_dir",
)
LISTS = {"quant.transforms": "transform", "export": "exporter"}  # with such names
NOT_NULL = ("quant.optimizer", "quant.scheduler", "export")
# What is made, in this order; the model last, for it draws from the generator.
PARTS = (
    "data",
    "task",
    "quant",
    "trainer",
    "optimizer",
    "scheduler",
    "truth",
    "model_transform",
    "export",
    "model",
)
PATHS_OR_NAMES = ("data.tokenizer", "model.pretrained")  # of the bundled, or on a hub


def compose(*overrides: str) -> DictConfig:
    """Returns the config that `qtrain *overrides` would run; for tests and notebooks."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        words = [*overrides, *partners(list(overrides))]
        config = hydra.compose(
            "config", hydra_arguments(words), return_hydra_config=True
        )
        known = HydraConfig.instance()
        before = known.cfg
        known.set_config(config)  # for ${hydra:runtime.choices...}
        try:
            return resolve(config)
        finally:
            known.cfg = before  # whose folder of the start is that of the process


def resolve(config: DictConfig) -> DictConfig:
    """Returns a copy without Hydra's section; interpolations and file names become what they mean.

    A device or an observer that is not there becomes a line of `config.mistakes`, for
    `build` to raise with all others.

    Raises:
        ConfigError: an interpolation leads nowhere, or a value is missing.
    """
    # Hydra's section is most of what a copy would take
    config = OmegaConf.masked_copy(
        config, [str(key) for key in config if key != "hydra"]
    )
    refuse_config(unresolved(config))
    _from_start(config)
    mistakes = []
    try:
        config.device = find_device(config.device)
    except ConfigError as err:
        mistakes.append(str(err))
        config.device = "cpu"  # to find out what else is wrong
    # That of the pretrained model
    if OmegaConf.select(config, "data.tokenizer") == AUTO:
        config.data.tokenizer = own_tokenizer(
            OmegaConf.select(config, "model.pretrained")
        )
    config = OmegaConf.create(
        up_to_date(OmegaConf.to_container(config, resolve=True))
    )
    for key, group in (NAMED | LISTS).items():
        section, _, last = key.rpartition(".")
        node = OmegaConf.select(config, section) if section else config
        if (
            not OmegaConf.is_dict(node)
            or last not in node
            or OmegaConf.is_dict(node[last])
        ):
            continue
        value = node[last]
        items = list(value) if OmegaConf.is_list(value) else [value]
        names = [item for item in items if not OmegaConf.is_config(item)]
        if not names or names == [None] and key not in NOT_NULL:
            continue
        known = GlobalHydra.instance().config_loader().get_group_options(group)
        mistakes += [line for name in names for line in choice(key, name, known)]
        made = [_of_group(group, known, item) for item in items]
        made = (
            [item for item in made if item is not None]
            if OmegaConf.is_list(value)
            else made[0]
        )
        OmegaConf.update(config, key, made, merge=False)
        if made is not None:
            # Files may point to other settings
            OmegaConf.resolve(OmegaConf.select(config, key))
    if mistakes:
        config.mistakes = mistakes
    return config


def _of_group(group: str, known: list[str], item: Any) -> Any:
    """Returns the content of the file that `item` names, or None; no name stays as it is."""
    if OmegaConf.is_config(item):
        return item
    if item not in known:
        return None
    # A file without defaults: to compose it takes 25 times as long
    loader: Any = GlobalHydra.instance().config_loader()
    found = loader.repository.load_config(f"{group}/{item}")
    return (
        hydra.compose(f"{group}/{item}")[group]
        if found.defaults_list
        else found.config
    )


def _from_start(config: DictConfig) -> None:
    """Makes relative paths whole where hydra.job.chdir has left the folder they are meant from."""
    if not HydraConfig.initialized() or not HydraConfig.get().job.chdir:
        return
    start = Path(HydraConfig.get().runtime.cwd)
    for key in (*PATHS, *PATHS_OR_NAMES):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and (key in PATHS or (start / value).exists()):
            OmegaConf.update(config, key, str(start / Path(value).expanduser()))


@dataclass(frozen=True)
class RunParts:
    """What a run is built from; the generators' state is the one that making the model left."""

    data: DataLoaders
    model: nn.Module
    task: Task
    quantizer: Quantizer
    trainer: Trainer
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory
    truth: TruthGate
    model_transform: Callable[[nn.Module], None] | None
    export: list[Exporter]
    generator_state: torch.Tensor


def build(config: DictConfig) -> RunParts:
    """Returns the parts of a run; the only place where `_target_` becomes an object.

    What is `auto` in `config.task` and `config.model` becomes, in place, what the
    data say.

    Raises:
        ConfigError: all mistakes at once, each with its key, its value and what is
            allowed.
    """
    refuse_config(check_targets(config))
    problems = list(check_settings(config))
    made: dict[str, Any] = {}
    for key in PARTS:
        # Both specs first, so that the errors of both are reported
        if key == "quant":
            problems += spec_mistakes(config.quant, "weight")
            problems += spec_mistakes(config.quant, "activation")
            problems += spec_mistakes(config.quant, "capture")
            if any(
                re.match(r"quant\.(weight|activation|capture)[.=]", problem)
                for problem in problems
            ):
                continue
        if key in ("task", "model"):
            wrong = settle(key, config[key], made.get("data"), made.get("task"))
            problems += wrong
            if wrong:
                continue
        if key == "model":
            torch.manual_seed(
                0 if whole("seed", config.seed, 0, SEEDS) else config.seed
            )
        try:
            with impatient():
                made[key] = instantiate(config[key], _convert_="all")
        except Exception as err:
            problems += explain(key, config[key], err)
    generator_state = torch.get_rng_state()
    problems += disagreements(config, made, not problems)
    refuse_config(dict.fromkeys(problems))
    made["quantizer"] = made.pop("quant")
    return RunParts(**made, generator_state=generator_state)


def try_out(parts: RunParts, config: DictConfig) -> None:
    """Makes each optimizer and schedule once: what they refuse is known before any training.

    Apart from `build`, for the first optimizer has torch import its compiler, 2
    seconds that no other mistake has to wait for.

    Raises:
        ConfigError: one refuses its settings.
    """
    problems = refusals(vars(parts), config)
    if parts.quantizer.trains:
        problems += refusals(vars(parts.quantizer), config.quant, "quant.")
    refuse_config(problems)
