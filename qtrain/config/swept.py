"""A sweep over options that do not share all keys: each job heeds those that its own option has."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.config.command_line import config_dir

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

OPTIONAL = (
    "optional_keys"  # how the command tells its jobs which keys may be left out
)


def forgive(options: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides, keys that some swept option lacks made optional, with a note each.

    Args:
        options: what begins with a dash, and the values that go with it.
    """
    sweeps = {"-m", "--multirun"} & set(options)
    if not sweeps and not any(
        text.startswith(("experiment=", "sweep=")) for text in overrides
    ):
        return overrides, []
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        try:
            own = {
                text: OverridesParser.create().parse_override(text)
                for text in overrides
            }
            return _forgiven(options, own)
        except HydraException:  # whatever is wrong, Hydra says when it reads the same
            return overrides, []


def _forgiven(
    options: list[str], own: dict[str, "Override"]
) -> tuple[list[str], list[str]]:
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    folders = [
        v
        for k, v in zip(options, options[1:], strict=False)
        if k in ("--config-dir", "-cd")
    ]
    search = [
        f"hydra.searchpath=['file://{Path(folder).resolve()}']" for folder in folders
    ]
    fixed = [
        text for text, o in own.items() if _is_group(o) and not o.is_sweep_override()
    ]
    base = hydra.compose("config", [*search, *fixed], return_hydra_config=True)
    preset = [
        f"{key}={values}"
        for key, values in (base.hydra.sweeper.get("params") or {}).items()
    ]
    grid = {}
    presets = OverridesParser.create().parse_overrides(preset)
    for override in (*presets, *own.values()):
        if _is_group(override):
            grid[override.get_key_element()] = override
    lacking: dict[str, list[str]] = {}
    for group, override in grid.items():
        place = f"{override.package or override.key_or_group}."
        below = [
            text
            for text, other in own.items()
            if other.get_key_element().startswith(place)
            and _is_spelt(other.key_or_group, [config_dir(), *folders])
        ]
        if not below or not override.is_sweep_override():
            continue
        configs = {
            name: hydra.compose("config", [*search, *fixed, f"{group}={name}"])
            for name in override.sweep_string_iterator()
        }
        for text in below:
            key = own[text].key_or_group
            lacks = [name for name in configs if not _has(configs[name], key)]
            if 0 < len(lacks) < len(configs):
                lacking[text] = lacks
    if not lacking:
        return list(own), []
    keys = ",".join(
        f"[{own[text].key_or_group},{_quoted(_values(own[text])[0])}]"
        for text in lacking
    )
    kept = [f"++{text}" if text in lacking else text for text in own]
    notes = [
        f"{text}: left out for {', '.join(names)}, without this key"
        for text, names in lacking.items()
    ]
    return [*kept, f"+{OPTIONAL}=[{keys}]"], notes


def heed_own_keys(
    config: "DictConfig", overrides: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Removes, in place, optional keys that a job's options lack.

    Returns:
        the other overrides, and what the sweep's first job that is the same has in
        their place: nothing, if that is this job.
    """
    import hydra
    from omegaconf import open_dict

    overrides = list(overrides)
    with open_dict(config):
        optional = config.pop(OPTIONAL, ())
    if not optional:
        return overrides, []
    plain = [
        text for text in overrides if not text.startswith(("++", f"+{OPTIONAL}="))
    ]
    own = hydra.compose("config", plain)
    firsts = []
    for key, first in optional:
        given = [
            text.removeprefix("++")
            for text in overrides
            if text.startswith(f"++{key}=")
        ]
        if _has(own, key):
            plain += given
            continue
        if given and given[-1] != f"{key}={first}":
            firsts.append(f"{key}={first}")
        _remove(config, own, key)
    others = tuple(f"++{key}=" for key, _ in optional)
    plain += [
        text
        for text in overrides
        if text.startswith("++") and not text.startswith(others)
    ]
    return plain, firsts


def _remove(config: "DictConfig", own: "DictConfig", key: str) -> None:
    """Takes a key out of `config`, in place, with the sections around it that `own` lacks too."""
    from omegaconf import OmegaConf, open_dict

    parts = key.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    outermost = next(prefix for prefix in prefixes if not _has(own, prefix))
    if _has(config, outermost):
        section, _, name = outermost.rpartition(".")
        with open_dict(config):
            OmegaConf.select(config, section).pop(name)


def _values(override: "Override") -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return [str(value) for value in override.sweep_string_iterator()]


def _quoted(value: str) -> str:
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def options_with(key: str) -> list[str]:
    """Returns the options of the group at the start of `key` whose config has this key."""
    import hydra

    group = key.partition(".")[0]
    names = sorted(path.stem for path in (Path(config_dir()) / group).glob("*.yaml"))
    if not names or not _is_spelt(key, [config_dir()]):
        return []
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        return [
            name
            for name in names
            if _has(hydra.compose("config", [f"{group}={name}"]), key)
        ]


def _is_spelt(key: str, folders: Iterable[str]) -> bool:
    """Returns whether any YAML file has a key of that last name; composing them takes seconds."""
    name = re.compile(rf"\b{re.escape(key.rpartition('.')[2])}['\"]?\s*:")
    files = (path for folder in folders for path in Path(folder).rglob("*.yaml"))
    return any(name.search(path.read_text("utf-8", "replace")) for path in files)


def _is_group(override: "Override") -> bool:
    return (Path(config_dir()) / override.key_or_group).is_dir()


def _has(config: "DictConfig", key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            return False
        node = node._get_node(part)
    return True
