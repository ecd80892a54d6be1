"""Models written as timm's and Hugging Face's are."""

import functools
from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from plain import Head
from torch import nn


class NormAct(nn.BatchNorm2d):
    """Batch-norm and activation in one module, as timm has them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Activated(Head):
    def __init__(self):
        super().__init__()
        self.norm = NormAct(8)
        self.deep, self.late = nn.Conv2d(8, 8, 3), NormAct(8)

    def forward(self, x):
        return self.head(self.late(self.deep(self.norm(self.stem(x)))))


class Inherits(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Inherited(Activated):
    """What its batch-norms do is their base's, and an activation."""

    def __init__(self):
        super().__init__()
        self.norm, self.late = Inherits(8), Inherits(8)


@dataclass
class Output(OrderedDict):
    """A mapping of what is not None, and a dataclass of all."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        self.update(
            {name: value for name, value in known.items() if value is not None}
        )


def with_defaults(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs.setdefault("scale", 1.0)
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Head):
    """Its forward stands behind a decorator, needs no argument and takes any keyword."""

    @with_defaults
    # Its first argument has another name, as anyone may give it
    def forward(model, x: torch.Tensor | None = None, labels=None, **options):
        features = nn.ReLU()(model.norm(model.stem(x)))
        shape = (*features.shape[:2], -1)
        logits = model.head(features.reshape(shape).view_as(features))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss, logits * options["scale"])
