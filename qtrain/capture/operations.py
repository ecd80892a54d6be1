"""What torch's operations do to integers: make a scale of their own, keep it, or only ask."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qtrain.simulate.build import FIXED, SCALED

OPS: dict[Any, str] = {
    "add": "add",
    "matmul": "matmul",
    "mul": "mul",
    operator.add: "add",
    operator.matmul: "matmul",
    operator.mul: "mul",
    torch.add: "add",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.matmul: "matmul",
    torch.mul: "mul",
}
# What has a kernel that keeps the scale, or only moves integers about.
MOVES = {
    "chunk",
    "clone",
    "contiguous",
    "expand",
    "flatten",
    "mean",
    "permute",
    "reshape",
    "split",
    "squeeze",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.interpolate,
    F.max_pool2d,
    torch.chunk,
    torch.flatten,
    torch.max_pool2d,
    torch.mean,
    torch.permute,
    torch.reshape,
    torch.split,
    torch.squeeze,
    torch.transpose,
    torch.unbind,
    torch.unsqueeze,
}
MOVING = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.ChannelShuffle,
    nn.Flatten,
    nn.Hardtanh,
    nn.Identity,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.PixelShuffle,
    nn.ReLU,
    nn.ReLU6,
    nn.Unflatten,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d,
    nn.ZeroPad2d,
)
SITES = (*SCALED, *FIXED, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)
ASKS = {"dim", "numel", "size", "stride"}  # what only looks at a tensor's shape
