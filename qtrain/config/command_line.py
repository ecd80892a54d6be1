"""Where the config lies, and how its command line becomes Hydra's; without torch's slow import."""

import re
from pathlib import Path

VALUED = (
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--cfg",
    "-c",
    "--package",
    "-p",
)
# Keys that no file of conf has, for not every task takes them.
OPTIONAL = tuple(
    f"task.{key}=" for key in ("label_smoothing", "class_weights", "loss")
)


CALLS = "choice|range|interval|glob|shuffle|sort|tag|int|float|bool|str|json_str|extend_list"
NAMED = {  # keys that take the name of a file in a group
    "quant.weight.observer": "observer",
    "quant.activation.observer": "observer",
    "quant.optimizer": "optimizer",
    "quant.scheduler": "scheduler",
}


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns a command line's options, as -m, with their values, and its overrides."""
    options, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in VALUED:
            options += [value for value in [next(rest, None)] if value is not None]
    return options, overrides


def config_dir() -> str:
    """Returns the folder of the YAML files: in the installed package, or else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return str(installed if installed.is_dir() else package.parent / "conf")


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Returns a command line of ours in the words that Hydra 1.3 takes.

    It refuses null for a group that the defaults list holds as null, new keys without
    a plus, the quotes around such a key that YAML needs, as in {"*.mlp": float}, and
    a value with an equals sign without quotes.
    """
    kept = [a for a in arguments if a not in ("experiment=null", "sweep=null")]
    # Its name in 0.1.0
    kept = [re.sub(r"^(\+*)transform(?=[=.])", r"\1model_transform", a) for a in kept]
    kept = [f"++{a}" if a.startswith(OPTIONAL) else a for a in kept]
    kept = [_layers(a) if a.startswith("quant.layers") else _quoted(a) for a in kept]
    return [_of_group(a, kept) for a in kept]


def _of_group(argument: str, all_of_them: list[str]) -> str:
    """Returns quant.optimizer=NAME as Hydra's choice of a file where settings of it are named too.

    Else the name would take their place, or they that of the settings of another
    file.
    """
    key, _, name = argument.partition("=")
    if key not in NAMED or name == "null" or not re.fullmatch(r"[\w,]+", name):
        return argument
    has_settings = any(
        re.match(rf"\+*{re.escape(key)}\.", other) for other in all_of_them
    )
    return f"{NAMED[key]}@{argument}" if has_settings else argument


def _layers(argument: str) -> str:
    return "++" + re.sub(r"(['\"])(.*?)\1(?=\s*:)", r"\2", argument)


def _quoted(argument: str) -> str:
    """Returns KEY=VALUE with quotes around values that hold = or ( ), as `epoch=3 (1).pt`."""
    key, _, value = argument.partition("=")
    # Not what has quotes, is a list, a mapping or a function of Hydra's; nor an option.
    is_ours = (
        key.startswith("-")
        or key == "resume"
        or re.match(rf"['\"\[{{]|({CALLS})\(", value)
    )
    if not re.search("[=()]", value) or is_ours or "\\" in value or "'" in value:
        return argument
    parts = (
        f"'{part}'" if re.search("[=()]", part) else part for part in value.split(",")
    )
    return f"{key}={','.join(parts)}"


def refuse_choices(arguments: list[str]) -> None:
    """Raises ValueError where a group is given no file's name: Hydra's message would name no key.

    A key that every run has cannot be deleted either.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, QuotedString

    for argument in arguments:
        key = argument.partition("=")[0]
        if re.fullmatch(r"~\w+", key):
            raise ValueError(
                f"{argument}: every run needs this key; "
                "give it another value instead of deleting it"
            )
        group = Path(config_dir()) / key
        if (
            "=" not in argument
            or not re.fullmatch(r"\w[\w/]*", key)
            or not group.is_dir()
        ):
            continue
        override = OverridesParser.create().parse_override(argument)
        given = override.value()
        values = getattr(given, "list", [given])  # of a sweep
        if any(
            not isinstance(value, str | dict | QuotedString | Glob)
            or "${" in str(value)
            for value in values
        ):
            known = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            raise ValueError(f"{argument}: must be one of {known}")
