"""GGUF files, the format of llama.cpp: opened by the `gguf` package, with
errors that help.
"""

import logging
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"


def library(why: str) -> Any:
    """Returns the package `gguf`.

    Raises:
        ValueError: it is not installed; begins with `why`.
    """
    try:
        import gguf
    except ImportError as err:
        raise ValueError(
            f'{why}: needs the extra gguf (pip install "qtrain[gguf]")'
        ) from err
    # It tells of each file's every part
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def is_gguf(name: str) -> bool:
    """Returns whether a name means a GGUF file."""
    return name.endswith(SUFFIX)


def read(path: str, key: str) -> Any:
    """Returns a `gguf.GGUFReader` of a whole file.

    Args:
        key: the setting that holds `path`, for messages.

    Raises:
        ValueError: there is no such file, it is no GGUF or it is cut
            off.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{key}={path}: there is no such file; name a GGUF file")
    gguf = library(f"{key}={path}")
    try:
        return gguf.GGUFReader(file)
    except Exception as err:  # bytes that are no GGUF can raise anything
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(
            f"{key}={path}: is no whole GGUF file ({reason}); "
            "write or download it again"
        ) from err


def value(reader: Any, name: str) -> Any:
    """Returns what a file says under a name, as plain values; None where
    it says nothing.
    """
    field = reader.get_field(name)
    return None if field is None else field.contents()
