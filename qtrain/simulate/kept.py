"""What is kept of a long calibration, so that it can go on after an
interruption.
"""

from typing import Any


class Kept:
    """Where a long calibration keeps what it has finished; this one keeps
    nothing.
    """

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns what was kept under the key, by this run before it was
        ended; or None.
        """
        return None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keeps tensors and plain values."""
