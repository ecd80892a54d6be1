"""Whether fusing has left a model what it was."""

from torch import Tensor, nn

from qtrain.analyze.layerwise import (
    CALLED_INSTEAD,
    relative_error,
)

SAME_FUNCTION = 1e-4  # relative: folding a batch-norm rounds, and costs about 1e-6


def is_layer(name: str, module: nn.Module) -> bool:
    if type(module).__name__ in CALLED_INSTEAD:
        return True
    is_inner = name.endswith(".activation_post_process")
    return bool(name) and not is_inner and not any(True for _ in module.children())


def first_difference(
    before: dict[str, Tensor], after: dict[str, Tensor], fused: nn.Module
) -> str | None:
    """Returns the first layer, as they run, after which the fused model computes something else.

    A layer that others were fused into is compared with the last of these.
    """
    names = [name for name in before if name in after]
    is_gone = [isinstance(fused.get_submodule(name), nn.Identity) for name in names]
    for index, name in enumerate(names):
        if is_gone[index]:
            continue
        last = index
        while last + 1 < len(names) and is_gone[last + 1]:
            last += 1
        exact = before[names[last]]
        if (
            exact.shape != after[name].shape
            or relative_error(exact, after[name]) > SAME_FUNCTION
        ):
            return name
    return None
