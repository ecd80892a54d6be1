"""The YAML files of a run's folder, which anyone may have written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtrain.common.files import OVERRIDES, read_text
from qtrain.common.limits import MOST_LEVELS
from qtrain.common.plain import plain
from qtrain.common.shape import misfits
from qtrain.config.old_names import up_to_date
from qtrain.config.trust import require

# Each has its _target_.
MADE = (
    "task",
    "data",
    "model",
    "quant",
    "optimizer",
    "scheduler",
    "trainer",
    "truth",
)
SECTIONS = (*MADE, "logger", "measure")
VALUES = (
    "device",
    "threads",
    "checkpoint",
    "model_transform",
    "float_cache",
    "calib_batches",
    "calib_split",
)
SHAPE: dict[str, Any] = {
    **{key: {} for key in SECTIONS},
    **{
        key: object for key in VALUES
    },  # with mistakes in them the rest of qtrain deals
    "choices": {"*": str},
    "name": str | int,
    "seed": str | int | float,
    "objective": str | list,
}
MOST_BYTES = 2**20  # parsing so much takes seconds


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of a run's config.yaml.

    Raises:
        ValueError: it is damaged, or names what is neither harmless nor in
            QTRAIN_TRUST.
    """
    content = read_yaml(path)
    content = up_to_date(content)
    problem = (
        next(_damages(content), None)
        if isinstance(content, dict)
        else "it holds no mapping"
    )
    if problem is not None:
        raise ValueError(f"{path} is damaged ({plain(problem)}); start the run again")
    require(content, (), str(path))
    return content


def _damages(config: dict[str, Any]) -> Iterator[str]:
    yield from (f"there is no {key}" for key in SHAPE if key not in config)
    yield from (
        f"{key} is null"
        for key in (*SECTIONS, "choices", "name")
        if config[key] is None
    )
    yield from misfits(config, SHAPE, "config")
    yield from (
        f"there is no {key}._target_" for key in MADE if "_target_" not in config[key]
    )
    for role in ("weight", "activation"):
        spec = config["quant"].get(role)
        if isinstance(spec, dict) and isinstance(spec.get("observer"), str):
            yield (
                f"quant.{role}.observer is a name, "
                "for which a run writes what it stands for"
            )


def command_line(run_dir: Path) -> list[str]:
    """Returns the overrides that the run in `run_dir` was started with; [] where nothing tells.

    Raises:
        ValueError: the file that tells is damaged.
    """
    # The latter in 0.1.0
    for path in (run_dir / OVERRIDES, run_dir / ".hydra" / "overrides.yaml"):
        if path.is_file():
            found = read_yaml(path)
            if not isinstance(found, list):
                raise ValueError(
                    f"{path} is damaged (it holds no list); start the run again"
                )
            return [str(text) for text in found]
    return []


def read_yaml(path: Path) -> Any:
    """Returns the plain content of a YAML file; its interpolations are left as they stand.

    Raises:
        ValueError: it is no YAML, or has aliases (it could be endless), tags, or too
            many levels.
    """
    level = 0
    try:
        text = read_text(path, MOST_BYTES)
        for event in yaml.parse(text, yaml.SafeLoader):
            if (
                getattr(event, "anchor", None) is not None
                or getattr(event, "tag", None) is not None
            ):
                raise ValueError(
                    f"line {event.start_mark.line + 1}: "
                    "an anchor, an alias or a tag, which no run writes"
                )
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if level > MOST_LEVELS:
                raise ValueError(
                    f"line {event.start_mark.line + 1}: more than {MOST_LEVELS} levels"
                )
        return OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as err:
        raise ValueError(
            f"{path} is damaged ({' '.join(str(err).split())}); start the run again"
        ) from err
