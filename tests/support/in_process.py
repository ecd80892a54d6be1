"""The command `qtrain` in the tests' own process, of which it leaves nothing behind."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra

from qtrain.cli import run as cli
from qtrain.config.command_line import config_dir

SETS_MODE = ("experiment=", "sweep=", "hydra.mode=")


def mode_of_experiments(get_mode: Any) -> Any:
    """Hydra composes all just to see whether a config sets its mode: a few files alone do."""

    def find(hydra: Hydra, config_name: str, overrides: list[str]) -> Any:
        is_set = any(word.lstrip("+").startswith(SETS_MODE) for word in overrides)
        return get_mode(hydra, config_name, overrides) if is_set else None

    return find


def reading_once(load: Any) -> Any:
    """Each of the package's files of settings is read by one job for all, and copied."""
    known: dict[str, Any] = {}

    def read(source: FileConfigSource, path: str) -> Any:
        if source.path != config_dir():
            return load(source, path)
        if path not in known:
            known[path] = load(source, path)
        return copy.deepcopy(known[path])

    return read


GET_MODE = mode_of_experiments(Hydra.get_mode)
READ = reading_once(FileConfigSource.load_config)


@contextmanager
def in_process(folder: Path) -> Iterator[Callable[..., Any]]:
    """Yields run(*arguments): the command, started in `folder`; returns its exit code or error."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back
        patch.setattr(Hydra, "get_mode", GET_MODE)
        patch.setattr(FileConfigSource, "load_config", READ)

        def run(*arguments: str) -> Any:
            patch.setattr(sys, "argv", ["qtrain", *arguments])
            try:
                cli.main()
            except SystemExit as stop:
                return stop.code or 0
            return 0

        yield run
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.level = handlers, level


def told(code: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and all that was printed, an error as Python prints it."""
    printed = capsys.readouterr()
    text = printed.out + printed.err
    return (1, f"{text}{code}") if isinstance(code, str) else (code, text)
