import pytest
import torch
from torch import nn

from qtrain.simulate.points import output_points

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture
def make_conv_bn(make_qat, between):
    """make_conv_bn(conv_bn): the simulation of Conv-BN, its outputs float unless told."""

    def make(
        conv_bn,
        dims=2,
        relu=False,
        bias=False,
        momentum=0.1,
        activations=False,
        **settings,
    ):
        torch.manual_seed(0)
        norm = NORMS[dims](6, momentum=momentum)
        nn.init.normal_(norm.weight)  # some below 0
        nn.init.normal_(norm.bias)
        layers = [CONVS[dims](4, 6, 3, bias=bias), norm, *[nn.ReLU()] * relu]
        quantizer = make_qat(conv_bn=conv_bn, **settings)
        prepared = quantizer.prepare(
            between(*layers, fuse=[range(len(layers))])
        ).train()
        quantizer.on_epoch(prepared, 0)
        if not activations:  # rounding would make whole steps of the last digits
            for point in output_points(prepared.model).values():
                point.observing = point.quantizing = False
        return prepared

    return make
