"""The layers that a long calibration has finished: a run that was ended
goes on behind them.
"""

import hashlib
from typing import Any

from qtrain.runs.resume import Progress
from qtrain.simulate.kept import Kept


class FinishedLayers(Kept):
    """Keeps each layer in a file of its own in RUN/resume."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def get(self, key: str) -> dict[str, Any] | None:
        state = self.progress.read(_name(key))
        return None if state is None else state["extra"]

    def put(self, key: str, value: dict[str, Any]) -> None:
        self.progress.write(_name(key), {"extra": value})

    def __deepcopy__(self, memo: Any) -> "FinishedLayers":
        return self  # a copy of a simulation belongs to the same run


def _name(key: str) -> str:
    return f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
