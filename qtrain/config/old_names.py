"""Names that older versions wrote into configs and runs, and where their objects are now."""

from typing import Any

MOVED = {
    "qtrain.callbacks.": "qtrain.cli.callbacks.",
    "qtrain.eager.histogram": "qtrain.observer.histogram.HistogramObserver",
    "qtrain.eager.minmax": "qtrain.observer.minmax.MinMaxObserver",
    "qtrain.eager.moving_average": "qtrain.observer.moving_average.MovingAverageObserver",
    "qtrain.scheduler.": "qtrain.train.scheduler.",
    "qtrain.trainer.": "qtrain.train.trainer.",
    "qtrain.truth.": "qtrain.analyze.truth.",
}
RENAMED = {"transform": "model_transform"}  # keys of a whole config


def up_to_date(content: Any) -> Any:
    """Returns plain dicts, lists and values with each `_target_` by the name that it has now."""
    if isinstance(content, list):
        return [up_to_date(value) for value in content]
    if not isinstance(content, dict):
        return content
    found = {
        RENAMED.get(key, key) if "choices" in content else key: up_to_date(v)
        for key, v in content.items()
    }
    target = found.get("_target_")
    for old, new in MOVED.items():
        if isinstance(target, str) and target.startswith(old):
            found["_target_"] = new + target.removeprefix(old)
    return found
