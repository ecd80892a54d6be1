"""Networks put together of parts by a recipe: modules, functions, and both."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 8
ACTS = {
    "relu": (nn.ReLU, F.relu),
    "relu6": (nn.ReLU6, F.relu6),
    "hardswish": (nn.Hardswish, F.hardswish),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "tanh": (nn.Tanh, torch.tanh),
    "leaky": (nn.LeakyReLU, F.leaky_relu),
    "elu": (nn.ELU, F.elu),
    "gelu": (nn.GELU, F.gelu),
    "silu": (nn.SiLU, F.silu),
}


class Act(nn.Module):
    """An activation: a module, a function, or in place."""

    def __init__(self, name, how):
        super().__init__()
        self.how = how
        kind, self.function = ACTS[name]
        self.module = kind() if how == "module" else None
        self.can_replace = name not in ("sigmoid", "tanh", "gelu")

    def forward(self, x):
        if self.module is not None:
            return self.module(x)
        if self.how == "in place" and self.can_replace:
            return self.function(x, inplace=True)
        return self.function(x)


class Conv(nn.Module):
    """A convolution, and maybe batch-norm and an activation, in either order."""

    def __init__(self, size, groups, bias, order, act, padded=True):
        super().__init__()
        pad = size // 2 if padded else 0
        settings = {"padding": pad, "groups": groups, "bias": bias}
        self.conv = nn.Conv2d(WIDTH, WIDTH, size, **settings)
        self.norm = nn.BatchNorm2d(WIDTH) if "n" in order else None
        self.act, self.order = Act(*act), order

    def forward(self, x):
        parts = {"c": self.conv, "n": self.norm, "a": self.act}
        for letter in self.order:
            x = parts[letter](x)
        return x


class Residual(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        y = self.inner(x)
        if self.how == "in place":
            y += x
            return y
        if self.how == "scaled":
            return x + 0.5 * y
        return F.relu(y + x) if self.how == "relu" else torch.add(x, y)


class Branches(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.mix = nn.Conv2d(WIDTH * (len(inner) + 1), WIDTH, 1)

    def forward(self, x):
        return self.mix(torch.cat([x, *(part(x) for part in self.inner)], dim=1))


class Shared(nn.Module):
    """One module called twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(F.relu(self.inner(x)))


class Squeeze(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)
        self.how = how

    def forward(self, x):
        if self.how == "mean":
            gate = x.mean((2, 3), keepdim=True)
        else:
            gate = F.adaptive_avg_pool2d(x, 1)
        gate = self.up(F.relu(self.down(gate)))
        return x * (
            torch.sigmoid(gate) if self.how == "mean" else F.hardsigmoid(gate)
        )


class Other(nn.Module):
    """A norm, a shuffle of channels, a scale of its own, a dropout, a padding, a pooling."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.group, self.norm = nn.GroupNorm(2, WIDTH), nn.BatchNorm2d(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5)
        self.kernel = nn.Parameter(torch.randn(WIDTH, WIDTH, 1, 1) / 3)

    def forward(self, x):
        if self.what == "group":
            return self.group(x)
        if self.what == "norm":
            return self.norm(x)
        if self.what == "shuffle":
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.what == "halves":
            first, second = x.chunk(2, dim=1)
            return torch.cat([second, F.relu(first)], 1)
        if self.what == "scale":
            return x * self.scale
        if self.what == "kernel":
            return F.conv2d(x, self.kernel)
        if self.what == "dropout":
            return F.dropout(x, 0.1, self.training)
        if self.what == "pad":
            return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)
        return F.avg_pool2d(x, 3, 1, 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, 3).flatten(2).transpose(1, 2)
        y = self.norm(x)
        return self.fc((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rows = kind(WIDTH * 3, 16, batch_first=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, 3).permute(0, 2, 1, 3).flatten(2)
        return self.fc(self.rows(x)[0][:, -1])


class Flat(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.fc = nn.Linear(WIDTH * 9, 16)
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.how = norm

    def forward(self, x):
        x = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 3), 1))
        if self.how == "behind":
            x = F.relu(self.norm(x))
        elif self.how == "before":
            x = self.norm(F.relu(x))
        return self.last(x)


PARTS = {
    "conv": Conv,
    "residual": Residual,
    "branches": Branches,
    "shared": Shared,
    "squeeze": Squeeze,
    "other": Other,
}
HEADS = {
    "flat": lambda: Flat(None),
    "behind": lambda: Flat("behind"),
    "before": lambda: Flat("before"),
    "attention": Attention,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
}


def made(recipe):
    """Returns the module of a recipe: (name, its arguments), these perhaps recipes."""
    if isinstance(recipe, list):
        return [made(item) for item in recipe]
    if isinstance(recipe, tuple) and recipe and recipe[0] in PARTS:
        return PARTS[recipe[0]](*map(made, recipe[1]))
    return recipe


class Drawn(nn.Module):
    """Images to 10 numbers.

    Args:
        body: recipes of its parts, in order.
        head: a name of `HEADS`.
    """

    def __init__(self, body, head):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.body = nn.ModuleList(made(body))
        self.head = HEADS[head]()

    def forward(self, x):
        x = self.stem(x)
        for part in self.body:
            x = part(x)
        return self.head(x)
