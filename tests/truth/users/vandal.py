"""A model amid whose training something happens to the world around."""

import resource
import shutil
from pathlib import Path

from qtrain.model.mlp import MLP


class Vandal(MLP):
    """In its third step, once for each `path`: a folder is deleted, a file read, a disk filled."""

    done = set()

    def __init__(self, what, path):
        super().__init__(hidden=8, hidden_relu=True, output_relu=False)
        self.what, self.path, self.steps = what, path, 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3 and self.path not in self.done:
            self.done.add(self.path)
            getattr(self, self.what)()
        return super().forward(x)

    def delete(self):
        shutil.rmtree(self.path)

    def read(self):
        Path(self.path).read_bytes()

    def fill(self):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
