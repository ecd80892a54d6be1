"""Two models on the same examples: how far apart, and whether by more than chance."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qtrain.common.limits import LARGEST
from qtrain.leaderboard.runs import Run
from qtrain.leaderboard.statistics import mcnemar, paired_bootstrap
from qtrain.runs.quality import LOG, MEAN, RIGHT_OR_WRONG
from qtrain.runs.report import verify

if TYPE_CHECKING:
    import numpy as np

AT_ONCE = 4_000_000  # scores held for the bootstrap


@dataclass(frozen=True)
class Difference:
    """In the quality's shown unit; where no examples make it up there is neither error nor p."""

    value: float
    standard_error: float | None = None
    p: float | None = None


def to_float(runs: Sequence[Run]) -> tuple[list[Difference | None], list[str]]:
    """Returns each run's difference to its float model (None for that), and warnings.

    For right-or-wrong examples the report has all that the test needs; other scores
    are read.
    """
    found: list[Difference | None] = []
    for run in runs:
        value, counts, p = run.facts["difference"], run.report["difference"], None
        if run.examples == RIGHT_OR_WRONG and value is not None:
            p = mcnemar(counts["gained"], counts["lost"])
        found.append(
            None
            if value is None
            else Difference(value, run.facts["difference_se"], p)
        )
    tested = [
        i
        for i, run in enumerate(runs)
        if found[i] is not None and run.examples in (MEAN, LOG)
    ]
    differences, warnings = _test_means(
        [(runs[i], "quantized", runs[i], "float") for i in tested]
    )
    for i, difference in zip(tested, differences, strict=True):
        found[i] = difference
    return found, warnings


def to_baselines(
    pairs: Sequence[tuple[Run, Run | None]],
) -> tuple[list[Difference | None], list[str]]:
    """Returns each run's difference to its baseline, None without one, and warnings."""
    found: list[Difference | None] = [None] * len(pairs)
    means = []
    warnings = _unverified(
        run for pair in pairs if pair[1] is not None for run in pair
    )
    for i, (run, base) in enumerate(pairs):
        if base is None or base is run:
            continue
        found[i] = Difference(run.facts["quantized"] - base.facts["quantized"])
        if run.examples in (MEAN, LOG):
            means.append(i)
        if run.examples != RIGHT_OR_WRONG:
            continue
        try:
            gain = _gain(run, "quantized", base, "quantized")
        except ValueError as err:
            warnings.append(str(err))
            continue
        error = run.quality.scale * float(gain.std(ddof=1)) / len(gain) ** 0.5
        p = mcnemar(int((gain > 0).sum()), int((gain < 0).sum()))
        found[i] = Difference(run.quality.scale * float(gain.mean()), error, p)
    quadruples = [
        (run, "quantized", base, "quantized")
        for run, base in (pairs[i] for i in means)
        if base
    ]
    differences, more = _test_means(quadruples)
    for i, difference in zip(means, differences, strict=True):
        found[i] = difference
    return found, warnings + more


def _test_means(
    pairs: Sequence[tuple[Run, str, Run, str]],
) -> tuple[list[Difference], list[str]]:
    """Returns the differences in quality, by the paired bootstrap on examples."""
    if not pairs:
        return [], []
    import numpy as np

    found: list[Difference] = []
    warnings = _unverified(run for pair in pairs for run in (pair[0], pair[2]))
    waiting: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)

    def flush(length: int) -> None:
        rows = waiting.pop(length)
        for (i, _), p in zip(
            rows, paired_bootstrap(np.stack([gain for _, gain in rows])), strict=True
        ):
            found[i] = Difference(found[i].value, found[i].standard_error, float(p))

    for i, (run, kind, base, base_kind) in enumerate(pairs):
        difference = Difference(run.facts[kind] - base.facts[base_kind])
        try:
            gain = _gain(run, kind, base, base_kind)
            # d exp(mean loss) = exp(mean loss) d(mean loss)
            scale = run.facts[kind] if run.examples == LOG else run.quality.scale
            error = scale * float(gain.std(ddof=1)) / len(gain) ** 0.5
            difference = Difference(difference.value, error)
            waiting[len(gain)].append((i, gain))
        except ValueError as err:
            warnings.append(str(err))
            gain = np.empty(0)
        found.append(difference)
        if len(gain) and len(waiting[len(gain)]) * len(gain) >= AT_ONCE:
            flush(len(gain))
    for length in list(waiting):
        flush(length)
    return found, warnings


def _gain(run: Run, kind: str, base: Run, base_kind: str) -> "np.ndarray":
    """Returns the scores' differences (N,), in double precision."""
    ours, theirs = _scores(run)[kind], _scores(base)[base_kind]
    if ours.shape != theirs.shape or len(ours) < 2:
        raise ValueError(
            f"{run.folder}: its {len(ours)} examples cannot be paired with the "
            f"{len(theirs)} of {base.folder}; significance is not tested"
        )
    difference: np.ndarray[Any, Any] = ours.astype("float64") - theirs.astype(
        "float64"
    )
    return difference


@lru_cache(maxsize=32)  # baselines come again and again, one a seed
def _scores(run: Run) -> "dict[str, np.ndarray]":
    # Most comparisons do without the examples, and so numpy.
    from qtrain.leaderboard.scores import read_scores, scores_file

    path = scores_file(run.folder)
    try:
        if run.report["sha256"]:
            verify(run.folder, run.report, path.name)
        scores = read_scores(path)
    except ValueError as err:
        raise ValueError(f"{err}; significance is not tested") from err
    if missing := {"float", "quantized"} - set(scores):
        raise ValueError(
            f"{path}: holds no scores named {missing.pop()}; significance is not tested"
        )
    if not all(
        abs(values.astype("float64").sum()) < LARGEST for values in scores.values()
    ):
        raise ValueError(
            f"{path}: holds scores that are no numbers; significance is not tested"
        )
    return scores


def _unverified(runs: Iterable[Run | None]) -> list[str]:
    """Returns a warning if the examples of a run cannot be verified."""
    count = sum(run is not None and not run.report["sha256"] for run in runs)
    return (
        [
            "not verified: examples, where a run's report notes no SHA-256, "
            "as older versions'"
        ]
        if count
        else []
    )
