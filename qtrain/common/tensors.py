"""What torch tells of a tensor."""

import torch
from torch import Tensor, nn


def version(tensor: Tensor) -> int:
    """Returns a number that grows with each change in place; 0 for tensors made under
    torch.inference_mode, of which torch counts none.
    """
    return 0 if tensor.is_inference() else tensor._version


def counted(owner: nn.Module, name: str) -> Tensor:
    """Returns a module's buffer; one that `.to` or deepcopy made under torch.inference_mode
    is replaced by a copy, whose changes torch counts.
    """
    buffer = owner._buffers[name]
    assert buffer is not None
    if buffer.is_inference():
        with torch.inference_mode(False):
            buffer = owner._buffers[name] = buffer.clone()
    return buffer
