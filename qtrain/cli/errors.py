"""What the command `qtrain` says of an error, Hydra's own among them."""

import os
import re
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qtrain.config.swept import options_with

if TYPE_CHECKING:
    from omegaconf import DictConfig


def unknown_key(key: str, section: "DictConfig") -> str:
    """Returns what to say of a key that its section lacks: what was meant, or who has it."""
    known = sorted(map(str, section))
    text = f"{key}: there is no such key"
    if near := get_close_matches(key.rpartition(".")[2], known):
        text += f"; nearest: {', '.join(near)}"
    elif options := options_with(key):
        group = key.partition(".")[0]
        return (
            f"{text} with this {group}; "
            f"{', '.join(f'{group}={name}' for name in options)} have it"
        )
    text += f"; allowed beside it are {', '.join(known)}"
    # What is made from this section may take more than its YAML names.
    return (
        text
        if near or "_target_" not in section
        else f"{text}; to add it all the same: +{key}=VALUE"
    )


def explain(err: BaseException) -> str:
    """Returns an error's text; for an unknown key, with the keys that there are."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError

    from qtrain.runs import sweep

    if isinstance(err, FileNotFoundError) and err.filename is not None:
        return (
            f"{os.fsdecode(err.filename)}: there is no such file or folder; "
            "was it deleted while the run was at work?"
        )
    if isinstance(err, OSError) and err.errno is not None:
        where = "" if err.filename is None else f"{os.fsdecode(err.filename)}: "
        return (
            f"{where}{err.strerror}; hydra.run.dir and hydra.sweep.dir must name "
            "writable folders, on disks with room"
        )
    missing = sweep.extra_for(getattr(err, "missing_cfg_file", None))
    if missing is not None:
        return missing
    cause: BaseException | None = err
    while cause is not None:
        node = getattr(cause, "parent_node", None)
        if (
            node is not None
            and getattr(cause, "full_key", None)
            and "not in struct" in str(cause)
        ):
            return unknown_key(str(cause.full_key), node)  # type: ignore[attr-defined]
        if str(cause).startswith("Missing key "):
            return f"{cause.full_key}: is missing, and has no default"  # type: ignore[attr-defined]
        if isinstance(cause, InterpolationResolutionError):
            given = [argument for argument in sys.argv[1:] if "${" in argument]
            return (
                f"{', '.join(given) or cause.full_key}: {str(cause).splitlines()[0]}; "
                "name a key of this config"
            )
        cause = cause.__cause__ or cause.__context__
    if "Error merging override" in str(err) and err.__cause__ is not None:
        return f"{err}: {str(err.__cause__).splitlines()[0]}"
    if isinstance(err, HydraException) and not any(
        re.split(r"[=@]", a)[0] in str(err) for a in sys.argv[1:]
    ):
        return f"{err} (given {' '.join(sys.argv[1:])})"
    return str(err)
