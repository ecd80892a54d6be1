"""Layers, batch-norm and ReLU that run one behind the other, put together."""

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qtrain.capture.graphs import erase, module_of, only_user
from qtrain.simulate.fused import Fused


def group_layers(graph: fx.Graph, root: nn.Module, leaves: set[str]) -> list[str]:
    """Puts layers together where nobody else reads what lies between, in place.

    Args:
        leaves: names of modules that stay float.

    Returns:
        what was put together, as "Conv2d+BatchNorm2d+ReLU", once for each group.
    """
    made = []
    for node in list(graph.nodes):
        head = module_of(root, node)
        is_norm = type(head) in (nn.BatchNorm2d, nn.BatchNorm3d)
        if (
            not (is_norm or isinstance(head, nn.Linear | _ConvNd))
            or node.target in leaves
        ):
            continue
        assert head is not None
        parts: list[nn.Module] = [head]
        behind = only_user(node)
        norm = module_of(root, behind)
        if not is_norm and isinstance(norm, _BatchNorm) and _folds(head, norm, node):
            assert behind is not None
            parts.append(norm)
            erase(graph, behind, node)
        behind = only_user(node)
        act = module_of(root, behind)
        if isinstance(head, _ConvTransposeNd):
            pass  # its kernels have no ReLU within
        elif type(act) is nn.ReLU:
            assert behind is not None
            parts.append(act)
            erase(graph, behind, node)
        elif not is_norm and type(act) is nn.ReLU6:
            # It stays, and clips at 6: what it gets from a ReLU uses no integers
            # below zero.
            parts.append(nn.ReLU().train(root.training))
        if len(parts) > 1:
            root.set_submodule(str(node.target), Fused(*parts))
            made.append("+".join(type(part).__name__ for part in parts))
    return made


def _folds(layer: nn.Module, norm: _BatchNorm, node: fx.Node) -> bool:
    """Returns whether inference may fold a batch-norm into the layer before it."""
    if norm.running_mean is None or not norm.affine:
        return False
    # Its output channels are the weight's second axis
    if isinstance(layer, _ConvTransposeNd):
        return False
    if isinstance(layer, nn.Linear):
        # Of three dimensions, batch-norm's channels are the second
        value = node.meta["value"]
        return isinstance(value, Tensor) and value.ndim == 2
    return True
