"""A model that notes who listens to signals while it runs."""

import signal

from qtrain.model.mlp import MLP

SEEN = set()


class Watcher(MLP):
    def forward(self, x):
        SEEN.update(
            signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        )
        return super().forward(x)
