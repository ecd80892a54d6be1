"""NaN and infinity, in weights and in what layers put out: refused, with the layer's name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qtrain.analyze.truth import TruthError
from qtrain.backend import integers
from qtrain.functional.finite import is_finite


def require_finite_weights(model: nn.Module) -> None:
    """Raises TruthError where a parameter, statistic or scale is missing, NaN or infinite; by name.

    Other buffers may be: an attention mask, the range of an observer that saw
    nothing.
    """
    # Out of the state dict: a fake quantization works its scale out when it is asked for.
    statistics = (
        (n, b)
        for n, b in model.state_dict().items()
        if ".running_" in n or n.endswith(".scale")
    )
    for name, value in (*model.named_parameters(), *statistics):
        if is_lazy(value):
            raise TruthError(
                f"model: layer {name.rpartition('.')[0]} has no weights before it has "
                "seen an input; run the model on a sample at the end of its __init__, "
                "or give the layer its input size"
            )
        if not is_finite(value):
            bad = int((~value.isfinite()).sum())
            layer, kind = integers.users_name(model, name), name.rpartition(".")[2]
            layer = layer if layer == name else f"{layer}.{kind}"
            raise TruthError(
                f"layer {layer}: {bad} of {value.numel()} weights are NaN or infinite"
            )


@contextmanager
def assert_finite_outputs(
    model: nn.Module,
    stage: str,
    *,
    first_batch: int = 0,
    called: nn.Module | None = None,
) -> Iterator[None]:
    """Raises TruthError when a layer puts out NaN or infinity; names the layer and the batch.

    Args:
        model: whose layers are watched.
        stage: for messages.
        first_batch: the number of the first.
        called: the module that is called once a batch; None: `model`.
    """
    batch = first_batch - 1
    handles = []

    def count(*_: Any) -> None:
        nonlocal batch
        batch += 1

    def check(name: str) -> Any:
        def hook(_m: nn.Module, _i: Any, output: Any) -> None:
            if (
                isinstance(output, Tensor)
                and output.is_floating_point()
                and not is_finite(output)
            ):
                raise TruthError(
                    f"layer {name}: its output is not finite in {stage}, batch {batch}"
                )

        return hook

    handles.append((called or model).register_forward_pre_hook(count))
    for name, module in model.named_modules():
        if name and ".observer" not in name:
            handles.append(
                module.register_forward_hook(check(integers.users_name(model, name)))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
