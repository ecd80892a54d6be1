"""Ctrl-C; apart from all else, so that it is imported at once."""

import os
import sys
from signal import SIGINT


def quit_at_once(signum: int, frame: object) -> None:
    """Ends the process, which has nothing to clean up, with one line and the usual code."""
    os.write(2, b"qtrain: interrupted\n")
    os._exit(128 + signum)


def told(command: str) -> int:
    """Says that a command was interrupted, below what it has written; returns the usual code."""
    print(f"\n{command}: interrupted", file=sys.stderr)
    return 128 + SIGINT
