"""Operations of torch on integers that know their scale, by name; see `tensor.py`.

Each gets the function and its arguments, and returns NotImplemented where floats must
do it. A tensor of integers has `integers`, and gives others the same meaning by
`holding`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtrain.backend.int8.pooling import max_pool
from qtrain.backend.int8.quantizing import marked, plain, suits_torch
from qtrain.backend.int8.reference import as_bytes

# Of the integers' tensor; no number in it is read.
QUERIES = (
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "nelement",
    "numel",
    "size",
    "stride",
)
# Each number of the result is one of the input's, and the largest stays the largest.
MOVES = (
    "__getitem__",
    "amax",
    "amin",
    "channel_shuffle",
    "chunk",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "detach",
    "expand",
    "expand_as",
    "flatten",
    "flip",
    "gather",
    "index_select",
    "moveaxis",
    "movedim",
    "narrow",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "repeat_interleave",
    "reshape",
    "reshape_as",
    "roll",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "swapdims",
    "t",
    "take_along_dim",
    "tensor_split",
    "tile",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
)
AVERAGES = (
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "interpolate",
    "mean",
)
MAX_POOLS = (
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
)
DROPOUTS = ("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d")


def _first(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `handler` for operations whose first argument is the one with integers."""

    def handle(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(x, "is_quantized", False):
            return NotImplemented
        return handler(func, x, *args, **kwargs)

    return handle


def _integers(x: Any) -> Any:
    return getattr(x, "integers", x)


def _query(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return func(x.integers, *args, **kwargs)


def _move(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    found = func(x.integers, *map(_integers, args), **kwargs)
    return (
        x.holding(found)
        if isinstance(found, Tensor)
        else tuple(map(x.holding, found))
    )


def _to(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    found = func(x.integers, *args, **kwargs)
    if found.dtype == torch.uint8:
        return x.holding(found)
    return func(x.dequantize(), *args, **kwargs)


def _average(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("dtype") is not None:
        return NotImplemented
    if func.__name__ == "adaptive_avg_pool2d" and suits_torch(x.integers):
        known = marked(x.integers, x.scale, x.zero_point)
        return x.holding(plain(func(known, *args, **kwargs)))
    steps = x.integers.to(torch.float32).sub_(x.zero_point)  # padding adds zeros
    found = func(steps, *args, **kwargs).round_().add_(x.zero_point)
    return x.holding(as_bytes(found.clamp_(0, 255)))


def _maximum(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("return_indices"):
        return NotImplemented
    return x.holding(max_pool(func, x.integers, *args, **kwargs))


def _join(func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    first = tensors[0]
    has_integers = getattr(first, "is_quantized", False)
    if not has_integers or not all(map(first.same_scale, tensors)):
        return NotImplemented
    return first.holding(func([x.integers for x in tensors], *args, **kwargs))


def _pad(
    func: Any, x: Any, pad: Any, mode: str = "constant", value: Any = None
) -> Any:
    if mode == "constant":
        return x.holding(func(x.integers, pad, mode, x.to_integer(value or 0.0)))
    return x.holding(as_bytes(func(x.integers.to(torch.float32), pad, mode)))


def _relu(func: Any, x: Any, inplace: bool = False) -> Any:
    if inplace or func.__name__ == "relu_":
        x.integers.clamp_(min=x.zero_point)
        return x
    return x.holding(x.integers.clamp(min=x.zero_point))


def _relu6(func: Any, x: Any, inplace: bool = False) -> Any:
    return _clamp(func, x, 0.0, 6.0, inplace)


def _hardtanh(
    func: Any, x: Any, min_val: float = -1, max_val: float = 1, inplace: bool = False
) -> Any:
    return _clamp(func, x, min_val, max_val, inplace)


def _clamp(
    func: Any, x: Any, min: Any = None, max: Any = None, inplace: bool = False
) -> Any:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return NotImplemented
    low = 0 if min is None else x.to_integer(min)
    high = 255 if max is None else x.to_integer(max)
    if inplace or func.__name__.endswith("_"):
        x.integers.clamp_(low, high)
        return x
    return x.holding(x.integers.clamp(low, high))


def _dropout(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    training = kwargs.get("training", args[1] if len(args) > 1 else True)
    return NotImplemented if training else x


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(QUERIES, _first(_query)),
    **dict.fromkeys(MOVES, _first(_move)),
    **dict.fromkeys(AVERAGES, _first(_average)),
    **dict.fromkeys(MAX_POOLS, _first(_maximum)),
    **dict.fromkeys(DROPOUTS, _first(_dropout)),
    **dict.fromkeys(("clamp", "clamp_", "clip"), _first(_clamp)),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _join),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _first(_hardtanh)),
    **dict.fromkeys(("relu", "relu_"), _first(_relu)),
    "pad": _first(_pad),
    "relu6": _first(_relu6),
    "to": _first(_to),
}
