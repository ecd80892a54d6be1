"""The package's files of settings, read once for all tests of a process."""

import copy
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource

from qtrain.config.command_line import config_dir


def reading_once(load: Any) -> Any:
    """Returns Hydra's method that reads a file; it gives copies of what it has read of ours."""
    known: dict[str, Any] = {}

    def read(source: FileConfigSource, path: str) -> Any:
        if source.path != config_dir():
            return load(source, path)
        if path not in known:
            known[path] = load(source, path)
        return copy.deepcopy(known[path])

    return read


def read_once() -> None:
    """Has Hydra read each file but once: a job has 15, a seventh of what its settings take."""
    FileConfigSource.load_config = reading_once(FileConfigSource.load_config)
