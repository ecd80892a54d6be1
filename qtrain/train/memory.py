"""What a training holds in memory beside the activations of a step."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer


def held_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Returns the bytes of weights, of gradients and of the optimizer's states, worked out."""
    trained = [x for x in model.parameters() if x.requires_grad]
    states = [
        x
        for state in optimizer.state.values()
        for x in state.values()
        if isinstance(x, Tensor)
    ]
    return {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": _bytes(trained),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
