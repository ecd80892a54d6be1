"""A small U-Net: transposed convolutions, joins, an activation by table, a layer in float."""

from torch import nn

import qtrain


def stage(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class UNet(nn.Module):
    """Classifies by the mean of its last map."""

    def __init__(self, channels=1, classes=10, width=8):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.down1, self.down2 = stage(channels, width), stage(width, 2 * width)
        self.bottom = stage(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up1 = nn.ConvTranspose2d(
            2 * width, width, 3, 2, padding=1, output_padding=1
        )
        self.right2 = stage(4 * width, 2 * width)
        self.right1 = stage(2 * width, width)
        self.join2, self.join1, self.gate = (
            qtrain.FloatFunctional() for _ in range(3)
        )
        self.attention = nn.Softmax(1)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        a = self.down1(self.quant(x))
        b = self.down2(self.pool(a))
        c = self.bottom(self.pool(b))
        c = self.gate.mul(c, self.attention(c))
        b = self.right2(self.join2.cat([self.up2(c), b], 1))
        a = self.right1(self.join1.cat([self.up1(b), a], 1))
        return self.dequant(self.last(a)).mean((2, 3))

    def fuse_model(self, is_qat=False):
        names = ("down1", "down2", "bottom", "right2", "right1")
        qtrain.fuse(
            self, [[f"{name}.0", f"{name}.1"] for name in names], is_qat=is_qat
        )
