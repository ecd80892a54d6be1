"""Which calls of a converted model have no int8 kernel, or a wrong one: all, by running it once."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

JOINED = {
    "aten::cat": "torch.cat",
    "aten::stack": "torch.stack",
    "aten::copy_": "torch's copy_ (a slice assignment)",
    "aten::index_put_": "assignment by indices",
}
# Of functions; the layers that clamp are mended, see int8_layers.py
CLAMPS = {f"aten::{name}{end}" for name in ("clamp", "hardtanh") for end in ("", "_")}
JOINS = ("add", "sub", "mul", "div", "cat", "stack", "matmul", "bmm", "addmm")


class KernelProbe(TorchDispatchMode):
    """While entered, a call without int8 kernel is noted and computed in float; the next shows too.

    Args:
        model: the converted model.
        layer: returns the name of the layer that runs, "" for the model itself.
        most_steps: what a join of tensors may be off, in quantization steps (root
            mean square); requantizing alone costs 0.29.

    Attributes:
        missing: the calls without a kernel, a line each, in the order of execution.
        wrong: those that torch computes wrongly in silence.
    """

    def __init__(
        self, model: nn.Module, layer: Callable[[], str], most_steps: float
    ) -> None:
        super().__init__()
        self.model, self.layer, self.most_steps = model, layer, most_steps
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        quantized = [
            x
            for x in tree_iter((args, kwargs))
            if isinstance(x, Tensor) and x.is_quantized
        ]
        name = func.name().partition(".")[0]
        is_checked = bool(quantized) and name in CLAMPS
        is_checked = is_checked or len(quantized) > 1 and name in JOINED
        exact = _exactly(func, args, kwargs) if is_checked else None
        before = (
            (args[0].q_scale(), args[0].q_zero_point())
            if exact is not None and func._schema.is_mutable
            else None
        )
        try:
            output = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as err:
            output = _instead(func, args, kwargs, bool(quantized))
            if output is None:
                raise
            self._note(self.missing, _reason(func, args, str(err), self.layer()))
            return output
        steps = 0.0 if exact is None else _steps_apart(exact, output, before)
        if steps > self.most_steps:
            self._note(self.wrong, _wrong(name, steps))
        return output

    def _note(self, lines: list[str], reason: str) -> None:
        layer = self.layer()
        kind = type(self.model.get_submodule(layer)).__name__
        where = f"layer {layer} ({kind})" if layer else f"forward of {kind}"
        line = f"{where} cannot run in the int8 model: {reason}"
        # The caller raises what came first
        if line not in lines:
            lines.append(line)


def _wrong(name: str, steps: float) -> str:
    """Returns what torch does wrongly in silence, and what to do."""
    if name in CLAMPS:
        return (
            f"the engine's {name} mixes up an int8 tensor's values, in silence, and is "
            f"{steps:.1f} steps off; use a layer, such as nn.ReLU6 or nn.Hardtanh, or "
            f"another quant.engine{_source()}"
        )
    return (
        f"{JOINED[name]} of int8 tensors with different scales gives them all one of "
        f"these scales, in silence, and is {steps:.1f} steps off; join them by the cat "
        f"of a qtrain.FloatFunctional of its own{_source()}"
    )


def _exactly(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Returns what a call on int8 tensors should come to, in float."""
    with _disable_current_modes():
        copies = tree_map(
            lambda x: _dequantize(x.clone()) if isinstance(x, Tensor) else x,
            (args, kwargs),
        )
        output: Tensor = func(*copies[0], **copies[1])
        return output


def _steps_apart(
    exact: Tensor, output: Tensor, before: tuple[float, int] | None
) -> float:
    """Returns the root mean square difference in steps of `output`.

    Args:
        before: scale and zero point that a tensor written into had. One written into
            as a whole has the new ones now; of a slice, the tensor that it belongs to
            keeps the old ones.
    """
    with _disable_current_modes():
        is_slice = (
            output.untyped_storage().nbytes() > output.numel() * output.element_size()
        )
        scale, zero_point = (
            before
            if before is not None and is_slice
            else (output.q_scale(), output.q_zero_point())
        )
        values = (output.int_repr().float() - zero_point) * scale
        return float(((values - exact) / scale).square().mean().sqrt())


def _quantize(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.is_quantized or not x.is_floating_point():
        return x
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / 255, 1e-7)
    return torch.quantize_per_tensor(
        x.float().contiguous(),
        scale,
        min(max(round(-low / scale), 0), 255),
        torch.quint8,
    )


def _dequantize(x: Any) -> Any:
    return x.dequantize() if isinstance(x, Tensor) and x.is_quantized else x


def _instead(func: Any, args: Any, kwargs: Any, has_quantized: bool) -> Any:
    """Returns what the call might have come to, right in shape; None where it fails otherwise."""
    with _disable_current_modes():
        try:
            if func.namespace == "quantized":
                return func(*tree_map(_quantize, args), **tree_map(_quantize, kwargs))
            if not has_quantized:
                return None
            output = tree_map(
                _quantize,
                func(*tree_map(_dequantize, args), **tree_map(_dequantize, kwargs)),
            )
        except (
            RuntimeError,
            NotImplementedError,
        ):
            return None
        if (
            func._schema.is_mutable
            and isinstance(args[0], Tensor)
            and args[0].is_quantized
        ):
            return args[0].copy_(output)
        return output


def _reason(func: Any, args: Any, text: str, layer: str) -> str:
    op = func.name().partition(".")[0]
    short = op.rpartition("::")[2].rstrip("_")
    tensors = [x for x in tree_iter(args) if isinstance(x, Tensor)]
    floats = [x for x in tensors if not x.is_quantized and x.is_floating_point()]
    missing = "Could not run" in text or "not implemented" in text
    what = (
        f"torch has no int8 kernel for {op}"
        if missing
        else text.strip().splitlines()[0][:200]
    )
    remedy = (
        f"To keep it float: quant.layers={{{layer}: float}}"
        if layer
        else "Put DeQuantStub and QuantStub around it"
    )
    if floats and len(floats) < len(tensors):
        what = f"{short} of an int8 tensor and a float one, such as an nn.Parameter"
        remedy = (
            "Give the float one a QuantStub of its own, "
            "and use a qtrain.FloatFunctional"
        )
    elif op.startswith("quantized::") and floats:
        what = f"{op} gets a float input"
        remedy = (
            f"Call a qtrain.QuantStub on it before. {remedy}"
            if layer
            else "Call a QuantStub on it before"
        )
    elif short in JOINS:
        what += (
            "; use one qtrain.FloatFunctional per call site in place of the operator"
        )
        remedy = remedy if layer else ""
    return f"{what}{_source()}{f'. {remedy}' if remedy else ''}"


def _source() -> str:
    """Returns the line of a forward that is not torch's, which is running now."""
    for frame in reversed(traceback.extract_stack()):
        own = "/torch/" in frame.filename or frame.filename.endswith(
            ("torch_ao/kernels.py", "torch_ao/int8_layers.py")
        )
        if frame.name == "forward" and not own and frame.line:
            return f" [{frame.filename}:{frame.lineno}: {frame.line}]"
    return ""
