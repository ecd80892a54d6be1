"""Models as people write them: no stubs, functions for activations, `+` for sums."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class Head(nn.Module):
    """28 x 28 digits to 10 logits: what all others build on."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * 16, 10)

    def features(self, x):
        return F.relu(self.norm(self.stem(x)))

    def head(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))

    def forward(self, x):
        return self.head(self.features(x))


class Residual(Head):
    """Sums of differing scales, in place and out of it, and one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.features(x)
        y = self.b(self.relu(self.a(x)))
        y += 0.1 * x
        y = self.relu(y)
        return self.head(y * torch.sigmoid(y))


class Twice(Head):
    """One convolution called twice."""

    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.features(x)
        return self.head(F.relu(self.again(F.relu(self.again(x)))))


class Branches(Head):
    """Three branches joined, and a padding."""

    def __init__(self):
        super().__init__(24)
        self.branches = nn.ModuleList(nn.Conv2d(24, 8, 1) for _ in range(3))

    def forward(self, x):
        x = F.pad(self.features(x), (1, 1, 1, 1))
        x = F.max_pool2d(x, 2)
        return self.head(torch.cat([branch(x) for branch in self.branches], dim=1))


class Squeeze(Head):
    """A depthwise block with Hardswish and squeeze-excite."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = F.hardswish(self.deep(self.features(x)))
        gate = F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


class Norms(Head):
    """GroupNorm, PReLU, and a batch-norm behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.group, self.act = nn.GroupNorm(2, 8), nn.PReLU()
        self.conv, self.late = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.act(self.group(self.features(x)))
        return self.head(self.late(F.relu(self.conv(x))))


class Functional(Head):
    """A weight of its own, met by F.conv2d and F.linear; a dropout that is a function."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.matrix = nn.Parameter(torch.randn(10, 128) / 11)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        del self.fc

    def forward(self, x):
        x = F.relu(F.conv2d(self.features(x), self.kernel, padding=1)) * self.scale
        x = F.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1), 0.1, self.training)
        return F.linear(x, self.matrix)


class Tokens(Head):
    """Patches with a class token and positions, through nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8) / 10)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.before, self.fc = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 4).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.before(x)
        x = x + self.attention(y, y, y)[0]
        return self.fc(x[:, 0])


class Drops(Head):
    """Skips a block at random, in training."""

    def __init__(self):
        super().__init__()
        self.block, self.path = nn.Conv2d(8, 8, 3, padding=1), DropPath()

    def forward(self, x):
        x = self.features(x)
        return self.head(x + self.path(self.block(x)))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.9)


class Auxiliary(Head):
    """A second head in training."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(128, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 4).flatten(1)
        return (self.fc(x), self.second(x)) if self.training else self.fc(x)


class LooksAtValues(nn.Module):
    """Resists: what it does depends on a tensor."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        if x.max() > 0:
            x = self.mix(x)
        return x


class Island(Head):
    """One module of several resists."""

    def __init__(self):
        super().__init__()
        self.gate, self.after = LooksAtValues(), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.head(F.relu(self.after(self.gate(self.features(x)))))


class Resists(Head):
    """Its own forward depends on a tensor."""

    def forward(self, x):
        x = self.features(x)
        if x.max() > 0:
            x = x * 2
        return self.head(x)


class Sums(nn.Module):
    """Goes through the samples one by one."""

    def forward(self, x):
        rows = [x[i] * 2 for i in range(x.shape[0])]
        return torch.stack(rows)


class Loops(Head):
    """Holds a loop over the samples."""

    def __init__(self):
        super().__init__()
        self.sums = Sums()

    def forward(self, x):
        return self.head(self.sums(self.features(x)))


class LoopsItself(Head):
    """Its own forward holds such a loop."""

    def forward(self, x):
        y, total = self.features(x), 0
        for i in range(len(x)):
            total = total + y[i].mean()
        return self.head(y) + total


class OtherInEval(Head):
    """Trains another function than it is in the end."""

    def forward(self, x):
        x = self.features(x)
        return self.head(x if self.training else x * 2)


class Sizes(Head):
    """Asks for sizes: of any batch, and of images that are large enough."""

    def forward(self, x):
        n, c, height, width = x.shape
        assert x.dim() == 4 and c in (1, 3)
        if height < 8:
            x = F.interpolate(x, size=(8, 8))
        x = self.features(x)
        x = x + torch.zeros(n, 8, 1, 1)
        return self.head(x.view(n, 8, *x.shape[2:]))


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


class Several(Head):
    """Two inputs, one by keyword, and an output of several parts."""

    def __init__(self, kind="dict"):
        super().__init__()
        self.kind, self.side = kind, nn.Linear(4, 10)

    def forward(self, x, extra=None, scale=1.0):
        features = self.features(x)
        logits = self.head(features) * scale
        if extra is not None:
            logits = logits + self.side(extra)
        if self.kind == "dict":
            return {"logits": logits, "features": features}
        return (
            Output(logits, features)
            if self.kind == "dataclass"
            else (logits, features)
        )


class InPlace(Head):
    """Changes tensors that others still see."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        x = self.features(x)
        y = x
        if self.kind == "shared":
            y += 1
            return self.head(x * y)
        if self.kind == "view":
            x[:, :4].mul_(2)
            return self.head(x)
        if self.kind == "item":
            x[:, 0] = 0
            return self.head(x)
        return self.head(F.relu(x - 1, inplace=True) + torch.add(x, y, alpha=3))


class PreActivation(Head):
    """Batch-norm and ReLU before a convolution, behind a pooling."""

    def __init__(self):
        super().__init__()
        self.pre, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.max_pool2d(self.features(x), 2)
        return self.head(self.conv(F.relu(self.pre(x))))


class Transposed(Head):
    """A transposed convolution, and batch-norm behind it."""

    def __init__(self):
        super().__init__()
        self.up, self.late = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.head(F.relu(self.late(self.up(self.features(x)))))


class Recurrent(Head):
    """An LSTM reads the rows."""

    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8 * 14, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        x = self.features(x).permute(0, 2, 1, 3).flatten(2)
        return self.fc(self.lstm(x)[0][:, -1])


class Projected(Recurrent):
    """Its LSTM has a projection."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8 * 14, 20, batch_first=True, proj_size=16)


class Gated(Head):
    """A GRU of two layers reads the rows both ways."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8 * 14, 16, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.features(x).permute(0, 2, 1, 3).flatten(2)
        return self.fc(self.gru(x)[0][:, -1])


class Everything(Head):
    """All at once."""

    def __init__(self):
        super().__init__()
        self.residual, self.squeeze, self.tokens = Residual(), Squeeze(), Tokens()
        self.gate, self.recurrent, self.drops = LooksAtValues(), Recurrent(), Drops()

    def forward(self, x):
        parts = (self.residual, self.squeeze, self.tokens, self.recurrent, self.drops)
        first = self.head(self.gate(self.features(x)))
        return torch.stack([first, *(part(x) for part in parts)]).mean(0)


class NormFirst(Head):
    """Older networks' order: batch-norm behind the ReLU, so that it goes into the next layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.late = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.wide, self.padded = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.flat, self.fc = nn.BatchNorm1d(128), nn.Linear(128, 10)

    def forward(self, x):
        x = self.late(F.relu(self.conv(self.features(x))))
        x = self.padded(self.wide(F.relu(self.deep(x))))
        x = F.adaptive_avg_pool2d(F.relu(x), 4).flatten(1)
        return self.fc(self.flat(x))


class LinearNorm(Head):
    """Batch-norm behind a Linear layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.one = nn.Linear(128, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(F.relu(self.one(self.head(self.features(x)))))


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 has it: a Linear layer whose weight lies the other way."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Turned(Head):
    """Its head is a Conv1D."""

    def __init__(self):
        super().__init__()
        self.fc = Conv1D(10, 128)


class Clipped(Head):
    """Clips at 6, and within -1..1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.six, self.one = nn.ReLU6(), nn.Hardtanh()

    def forward(self, x):
        return self.head(self.one(self.b(self.six(self.a(20 * self.features(x))))))
