"""The command `qtrain` from its first moment: Ctrl-C ends it quietly while Python imports."""

import signal

from qtrain.cli.interrupt import quit_at_once


def main() -> None:
    """Runs the command; see `qtrain.cli.run`."""
    signal.signal(signal.SIGINT, quit_at_once)
    from qtrain.cli.run import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
