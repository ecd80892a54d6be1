"""Graceful shutdown on SIGINT and SIGTERM."""

import signal
import threading
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; `signum` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """While entered, SIGINT and SIGTERM raise Interrupted: now, or at a training's next step."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python allows handlers there alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._receive)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if self.training and self.pending is None:
            self.pending = signum
        else:  # a second signal does not wait
            raise Interrupted(signum)
