"""Ctrl-C where there is nothing to clean up; apart from all else, so that it is imported at once."""

import os


def quit_at_once(signum: int, frame: object) -> None:
    """Ends the process with one line and the usual code."""
    os.write(2, b"qtrain: interrupted\n")
    os._exit(128 + signum)
