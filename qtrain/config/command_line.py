"""Where the config lies, and how its command line becomes Hydra's; without torch, whose import takes seconds."""

import re
from pathlib import Path


def config_dir() -> str:
    """Returns the folder of the YAML files: inside the installed package, or else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.parent / "conf")


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Returns a command line of ours in the words that Hydra 1.3 takes.

    It refuses null for a group that the defaults list holds as null, new keys in a mapping without a plus, and the
    quotes around such a key that YAML needs, as in {"*.mlp": float}.
    """
    kept = [a for a in arguments if a not in ("experiment=null", "sweep=null")]
    return ["++" + re.sub(r"(['\"])(.*?)\1(?=\s*:)", r"\2", a) if a.startswith("quant.layers") else a for a in kept]


def refuse_lists(arguments: list[str]) -> None:
    """Raises ValueError where a group is given a list, which Hydra would take for several files, and die of numbers."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value.startswith("[") and (Path(config_dir()) / group).is_dir():
            known = ", ".join(sorted(path.stem for path in (Path(config_dir()) / group).glob("*.yaml")))
            raise ValueError(f"{argument}: must be one of {known}")
