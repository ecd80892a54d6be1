"""Hydra callbacks."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Comparison(Callback):
    """Compares the runs of a sweep at its end."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        pass
