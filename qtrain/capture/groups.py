"""Layers, batch-norm and ReLU that run one behind the other, put together."""

from typing import Any

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
        is_weighted = isinstance(head, nn.Linear | _ConvNd)
        if head is None or not (is_norm or is_weighted) or node.target in leaves:
            continue
        parts = [head]
        if is_weighted:
            parts += _norm_behind(graph, root, node)
        parts += _relu_behind(graph, root, node, head)
        if is_weighted and not any(isinstance(part, _BatchNorm) for part in parts):
            parts = _norm_before(graph, root, node, leaves) + parts
        if len(parts) > 1:
            root.set_submodule(str(node.target), Fused(*parts))
            made.append("+".join(type(part).__name__ for part in parts))
    return made


def _norm_behind(graph: fx.Graph, root: nn.Module, node: fx.Node) -> list[nn.Module]:
    """Takes the batch-norm behind a layer out of the graph, if inference may fold it."""
    behind = only_user(node)
    norm = module_of(root, behind)
    if (
        behind is None
        or norm is None
        or not _is_affine(norm)
        or not _has_its_channels(root, node)
    ):
        return []
    erase(graph, behind, node)
    return [norm]


def _relu_behind(
    graph: fx.Graph, root: nn.Module, node: fx.Node, head: nn.Module
) -> list[nn.Module]:
    """Takes the ReLU behind a layer out of the graph, if the layer's kernel can have it within."""
    behind = only_user(node)
    act = module_of(root, behind)
    if isinstance(head, _ConvTransposeNd):
        return []
    if type(act) is nn.ReLU:
        assert behind is not None
        erase(graph, behind, node)
        return [act]
    if type(act) is nn.ReLU6 and not isinstance(head, _BatchNorm):
        # It stays, and clips at 6: what it gets from a ReLU uses no integers below zero.
        return [nn.ReLU().train(root.training)]
    return []


def _norm_before(
    graph: fx.Graph, root: nn.Module, node: fx.Node, leaves: set[str]
) -> list[nn.Module]:
    """Takes the batch-norm before a layer out of the graph, if inference may fold it."""
    source: Any = node.args[0] if node.args else None
    norm = module_of(root, source) if isinstance(source, fx.Node) else None
    if norm is None or source.target in leaves or only_user(source) is None:
        return []
    if not _is_affine(norm) or not _sees_all_alike(root, node):
        return []
    erase(graph, source, source.args[0])
    return [norm]


def _is_affine(norm: Any) -> bool:
    """Returns whether a module is a batch-norm that inference may fold."""
    is_norm = isinstance(norm, _BatchNorm)
    return is_norm and norm.running_mean is not None and bool(norm.affine)


def _has_its_channels(root: nn.Module, node: fx.Node) -> bool:
    """Returns whether a layer's outputs are the channels of a batch-norm beside it."""
    # Of three dimensions, batch-norm's channels are the second, and a Linear layer's
    # the last.
    value = node.meta["value"]
    is_linear = isinstance(module_of(root, node), nn.Linear)
    return not is_linear or isinstance(value, Tensor) and value.ndim == 2


def _sees_all_alike(root: nn.Module, node: fx.Node) -> bool:
    """Returns whether what is added to a layer's inputs adds the same number everywhere.

    It does not where zeros are padded, nor where outputs have inputs of differing
    number.
    """
    layer: Any = module_of(root, node)
    if isinstance(layer, nn.Linear):
        return _has_its_channels(root, node)
    if isinstance(layer, _ConvTransposeNd):
        return False
    pads = layer._reversed_padding_repeated_twice
    return layer.padding_mode != "zeros" or not any(pads)
