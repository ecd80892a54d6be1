"""The command `qtrain` in the tests' own process, of which it leaves nothing behind."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra

from qtrain.cli import run as cli

SETS_MODE = ("experiment=", "sweep=", "hydra.mode=")


def mode_of_experiments(get_mode: Any) -> Any:
    """Hydra composes all just to see whether a config sets its mode: a few files alone do."""

    def find(hydra: Hydra, config_name: str, overrides: list[str]) -> Any:
        is_set = any(word.lstrip("+").startswith(SETS_MODE) for word in overrides)
        return get_mode(hydra, config_name, overrides) if is_set else None

    return find


GET_MODE = mode_of_experiments(Hydra.get_mode)


@contextmanager
def in_process(folder: Path) -> Iterator[Callable[..., Any]]:
    """Yields run(*arguments): the command, started in `folder`; returns its exit code or error."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back
        patch.setattr(Hydra, "get_mode", GET_MODE)

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
