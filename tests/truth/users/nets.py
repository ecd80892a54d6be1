"""Models as people write them: sound ones, and ones with a fault each."""

import torch
import torch.nn.functional as F
from torch import nn

from qtrain import DeQuantStub, FloatFunctional, QuantStub


class Base(nn.Module):
    """28 x 28 digits to 10 logits, between stubs."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()


class Normed(Base):
    def __init__(self, norm="group", running=False):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=4)
        self.norm = (
            nn.GroupNorm(8, 8)
            if norm == "group"
            else nn.InstanceNorm2d(8, track_running_stats=running)
        )
        self.head = nn.Linear(8 * 49, 10)

    def forward(self, x):
        return self.dequant(
            self.head(F.relu(self.norm(self.conv(self.quant(x)))).flatten(1))
        )


class Joined(Base):
    """Two branches whose outputs have ranges 1 to 10, joined in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.join = how, FloatFunctional()
        self.a, self.b = nn.Linear(784, 10), nn.Linear(784, 10)
        with torch.no_grad():
            self.b.weight *= 10

    def forward(self, x):
        x = self.quant(x).flatten(1)
        a, b = self.a(x), self.b(x)
        if self.how == "cat":
            y = torch.cat([a[:, :5], b[:, :5]], 1)
        elif self.how == "stack":
            y = torch.stack([a, b], 1).mean(1)
        elif self.how == "slice":
            y = a.clone()
            y[:, :5] = b[:, :5]
        elif self.how == "copy":
            y = a.clone()
            y.copy_(b)
        else:
            y = self.join.cat([a[:, :5], b[:, :5]], 1)
        return self.dequant(y)


class InPlace(Base):
    """An activation that works in place behind a layer that is not fused with it."""

    def __init__(self, activation="relu"):
        super().__init__()
        kinds = {
            "relu": nn.ReLU,
            "relu6": nn.ReLU6,
            "hardswish": nn.Hardswish,
            "leaky": nn.LeakyReLU,
            "elu": nn.ELU,
        }
        self.conv, self.head = nn.Conv2d(1, 8, 3, stride=2), nn.Linear(8 * 169, 10)
        made = {"functional": F.relu_, "prelu": nn.PReLU()}
        self.act = made.get(activation) or kinds[activation](inplace=True)

    def forward(self, x):
        return self.dequant(self.head(self.act(self.conv(self.quant(x))).flatten(1)))


class ChangesItsInput(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(784, 10)

    def forward(self, x):
        x.mul_(0.5).add_(1)
        return self.dequant(self.head(self.quant(x).flatten(1)))


class KeepsActivation(Base):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(784, 16), nn.Linear(16, 10)

    def forward(self, x):
        self.kept = [self.fc(self.quant(x).flatten(1))]
        return self.dequant(self.head(self.kept[0]))


class Output(Base):
    """Outputs that are no logits (B, 10)."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(784, 16)
        self.head = nn.Linear(16, 5 if kind == "few" else 10)
        if kind == "map":
            self.conv = nn.Conv2d(1, 10, 28)
        if kind == "aux":
            self.aux = nn.Linear(16, 10)

    def forward(self, x):
        x = self.quant(x)
        if self.kind == "map":
            return self.dequant(self.conv(x))
        y = self.fc(x.flatten(1))
        out = self.dequant(self.head(y))
        if self.kind == "dict":
            return {"logits": out}
        return (
            (out, self.dequant(self.aux(y)))
            if self.training and self.kind == "aux"
            else out
        )


class NoStub(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(784, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


class Parameters(Base):
    """A plain nn.Parameter meets an int8 tensor."""

    def __init__(self, stub=False):
        super().__init__()
        self.fc = nn.Linear(784, 16)
        self.head = nn.Linear(16, 10)
        self.mul = FloatFunctional()
        self.gamma = nn.Parameter(torch.full((16,), 0.1))
        self.stub = QuantStub() if stub else None

    def forward(self, x):
        y = self.fc(self.quant(x).flatten(1))
        gamma = self.gamma if self.stub is None else self.stub(self.gamma)
        y = y * gamma if self.stub is None else self.mul.mul(y, gamma.expand_as(y))
        return self.dequant(self.head(y))


class Lazy(Base):
    """A layer that makes its weights when it sees the first input."""

    def __init__(self, shown=False):
        super().__init__()
        self.fc = nn.LazyLinear(10)
        if shown:
            self(torch.zeros(2, 1, 28, 28))

    def forward(self, x):
        return self.dequant(self.fc(self.quant(x).flatten(1)))


class Several(Base):
    """Three calls without int8 kernels."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(784, 16), nn.Linear(16, 10)

    def forward(self, x):
        y = F.silu(self.fc(self.quant(x).flatten(1)))
        return self.dequant(self.head(F.softplus(y + y)))


class WeightNormed(Base):
    def __init__(self, norm):
        super().__init__()
        wrap = {
            "weight_norm": nn.utils.weight_norm,
            "spectral_norm": nn.utils.spectral_norm,
            "new_weight_norm": nn.utils.parametrizations.weight_norm,
            "new_spectral_norm": nn.utils.parametrizations.spectral_norm,
        }
        self.fc = wrap[norm](nn.Linear(784, 10))

    def forward(self, x):
        return self.dequant(self.fc(self.quant(x).flatten(1)))


class Tokens(Base):
    def __init__(self, qconfig=False, bag=False):
        super().__init__()
        self.emb = (
            nn.EmbeddingBag(256, 16, mode="sum") if bag else nn.Embedding(256, 16)
        )
        self.head, self.bag = nn.Linear(16, 10), bag
        if qconfig:
            self.emb.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig

    def forward(self, x):
        tokens = ((x.flatten(1) + 0.5) * 50).long().clamp(0, 255)
        y = self.emb(tokens) if self.bag else self.emb(tokens).sum(1)
        return self.dequant(self.head(self.quant(y)))


class Pooled(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(7, 7, padding=3, count_include_pad=False)
        self.head = nn.LazyLinear(10)
        self(torch.zeros(1, 1, 28, 28))

    def forward(self, x):
        return self.dequant(self.head(self.pool(self.conv(self.quant(x))).flatten(1)))


class Recurrent(Base):
    def __init__(self, kind="GRU"):
        super().__init__()
        self.cell = getattr(nn, kind)(28, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.dequant(self.head(self.cell(self.quant(x).squeeze(1))[0][:, -1]))


class Table(Base):
    """A layer, and a table of numbers that no optimizer trains; of `dtype`."""

    def __init__(self, dtype="float32"):
        super().__init__()
        self.head = nn.Linear(784, 10)
        self.register_buffer("table", torch.zeros(4000, dtype=getattr(torch, dtype)))
        self.register_buffer("scratch", torch.zeros(9000), persistent=False)

    def forward(self, x):
        return self.dequant(self.head(self.quant(x).flatten(1)))


class Volume(Base):
    """A layer that sees digits as a volume, one deep."""

    def __init__(self, kind="Conv3d"):
        super().__init__()
        first = (
            nn.Conv3d(1, 4, (1, 3, 3), stride=(1, 3, 3))
            if kind == "Conv3d"
            else nn.MaxPool3d((1, 3, 3))
        )
        self.layers = nn.Sequential(
            first, nn.Flatten(), nn.Linear(324 if kind == "Conv3d" else 81, 10)
        )

    def forward(self, x):
        return self.dequant(self.layers(self.quant(x).unsqueeze(2)))


class Residual(Base):
    """Layers without bias, a sum, an activation behind it, and another behind the last stub."""

    def __init__(self, activation="relu"):
        super().__init__()
        kinds = {
            "relu": nn.ReLU,
            "silu": nn.SiLU,
            "prelu": nn.PReLU,
            "sigmoid": nn.Sigmoid,
        }
        self.conv1 = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.add = FloatFunctional()
        self.act = kinds[activation]()
        self.last = nn.SiLU()
        self.head = nn.Linear(4 * 169, 10, bias=False)

    def forward(self, x):
        x = self.conv1(self.quant(x))
        x = self.act(self.add.add(self.conv2(x), x))
        return self.last(self.dequant(self.head(x.flatten(1))))


class ByKeyword(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 16)
        self.head = nn.Linear(16, 10)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.dequant(
            self.head(self.act(input=self.fc(self.quant(x).flatten(1))))
        )
