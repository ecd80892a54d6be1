"""What torch tells of a tensor."""

from torch import Tensor


def version(tensor: Tensor) -> int:
    """Returns a number that grows with each change in place; 0 for tensors made under
    torch.inference_mode, of which torch counts none.
    """
    return 0 if tensor.is_inference() else tensor._version
