"""The metric that runs are compared by: which way is up, how it is shown and how it is tested."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# How the examples' scores make up a quality, which decides how a difference is tested.
RIGHT_OR_WRONG, MEAN, LOG = "right or wrong", "mean", "log"


@dataclass(frozen=True)
class Quality:
    """As a task states it.

    Attributes:
        scale: from the report's number to the shown one.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    scale: float = 1.0

    @property
    def step(self) -> str:
        """The unit of a difference."""
        return {"%": "points"}.get(self.unit, self.unit or self.name)

    def gain(self, value: float) -> float:
        """Returns a number that is larger where `value` is better."""
        return value if self.higher_is_better else -value

    def digits(self, values: Sequence[float]) -> int:
        """Returns how many decimals show the largest of some values to at least four digits."""
        if self.unit == "%":
            return 2
        largest = max(map(abs, values), default=0.0)
        return min(12, max(3, 3 - math.floor(math.log10(largest)))) if largest else 3

    def text(self, value: float) -> str:
        """Returns a number of the report as people read it."""
        shown = self.scale * value
        return f"{shown:.{self.digits([shown])}f} {self.unit}".rstrip()


# What older reports leave unsaid, and tasks may.
KNOWN = {
    "accuracy": Quality("accuracy", True, "%", 100.0),
    "perplexity": Quality("perplexity", False),
}
EXAMPLES = {"accuracy": RIGHT_OR_WRONG, "perplexity": LOG}


def of_task(task: Any) -> Quality:
    """Returns the quality that a task states.

    Raises:
        ValueError: it cannot be shown or compared.
    """
    name, higher = task.quality, task.higher_is_better
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise ValueError(
            f"task.quality={name!r}: must be a name of letters, digits, _ and -"
        )
    if not isinstance(higher, bool):
        raise ValueError(f"task.higher_is_better={higher!r}: must be True or False")
    known = KNOWN.get(name, Quality(name, higher))
    unit = getattr(task, "unit", known.unit)
    scale = getattr(task, "scale", known.scale)
    if not (isinstance(unit, str) and len(unit) <= 20 and unit.isprintable()):
        raise ValueError(
            f"task.unit={unit!r}: must be a short text such as 'dB', or ''"
        )
    if isinstance(scale, bool) or not (
        isinstance(scale, int | float) and 0 < scale < math.inf
    ):
        raise ValueError(
            f"task.scale={scale!r}: must be a number above 0, such as 100 for %"
        )
    return Quality(name, higher, unit, float(scale))


def of_report(report: dict[str, Any]) -> tuple[Quality, str | None]:
    """Returns a run's quality, and how its examples make it up; None where nothing tells.

    Raises:
        ValueError: the report does not say which way is up.
    """
    name, stated = report["quality"], report.get("scoring")
    if not stated:
        if name not in KNOWN:
            raise ValueError(
                f"quality is {name!r}, and no scoring says which way is up"
            )
        return KNOWN[name], EXAMPLES[name]
    quality = Quality(
        name, *(stated[key] for key in ("higher_is_better", "unit", "scale"))
    )
    if (
        None in (name, quality.higher_is_better, quality.unit, quality.scale)
        or quality.scale <= 0
    ):
        raise ValueError(f"scoring is {stated!r}")
    return quality, stated["examples"]


def made_of(
    quality: Quality, pairs: Sequence[tuple[float, Sequence[float]]]
) -> str | None:
    """Returns how the examples make up a quality, as far as their numbers show.

    Args:
        pairs: the quality of each model in the report's unit, and its examples'
            scores.
    """
    # The exponential of their mean but for windows that are shorter.
    if quality.name == "perplexity":
        return LOG
    for value, scores in pairs:
        mean = math.fsum(scores) / max(1, len(scores))
        if not math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-9):
            return None
    return (
        RIGHT_OR_WRONG
        if {score for _, scores in pairs for score in scores} <= {0, 1}
        else MEAN
    )
