"""A network that tells more classes apart than there are digits."""

from torch import nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub


class ManyClasses(nn.Sequential):
    def __init__(self, classes):
        super().__init__(
            nn.Flatten(), QuantStub(), nn.Linear(784, classes), DeQuantStub()
        )
