"""What a training can be resumed from, as the loop sees it: where its state goes and comes from."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

FOLDER = "resume"  # in a run's folder


class Checkpoint:
    """Where a stage of training leaves its state; this one keeps nothing.

    Attributes:
        extra: what else belongs to the state, of tensors and plain values.
    """

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}

    @property
    def must_stop(self) -> bool:
        """Returns whether the training shall save its state and end now."""
        return False

    def load(self) -> dict[str, Any] | None:
        """Returns the state to go on from, or None to begin; fills `extra`."""
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Keeps a state of tensors and plain values. The loggers have been flushed."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        pass


@contextmanager
def restoring(stage: str) -> Iterator[None]:
    """Turns whatever a state that does not fit raises where it is restored into one error."""
    try:
        yield
    except Exception as err:
        reason = (
            f"the state in {FOLDER}/{stage}.pt does not fit the training "
            f"({unreadable(err)})"
        )
        raise ValueError(
            f"{stage}: {reason}; delete it to train again from the start"
        ) from err


def unreadable(err: Exception) -> str:
    """Returns why torch.load failed; not in its words where they advise to load unchecked."""
    if isinstance(err, pickle.UnpicklingError):
        return "it holds something else than tensors and plain values"
    return (str(err) or type(err).__name__).splitlines()[0]
