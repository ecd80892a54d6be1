"""Batch-norms that are called as a function, by a forward of their own, as layers.

timm's do batch-norm and activation in one module; a user's subclass may do more.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import batchnorm

SIGNATURE = inspect.signature(F.batch_norm)
TENSORS = ("running_mean", "running_var", "weight", "bias")
SETTINGS = ("training", "momentum", "eps")


class Norms:
    """The layers that stand for calls of F.batch_norm in one trace.

    Args:
        root: the model that is traced; it gets the layers.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.layers: dict[str, str] = {}

    def layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Returns the name of a layer that does what this call does; None: there is none."""
        given = SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        found = given.arguments
        mean = found["running_mean"]
        if not isinstance(mean, fx.Node) or mean.op != "get_attr":
            return None
        name = str(mean.target).rpartition(".")[0]
        owner: Any = self.root.get_submodule(name)
        if not isinstance(owner, batchnorm._BatchNorm):
            return None
        settings = [getattr(owner, setting) for setting in SETTINGS]
        if [found[setting] for setting in SETTINGS] != settings:
            return None
        if not all(_is(found[part], owner, name, part) for part in TENSORS):
            return None
        if name not in self.layers:
            self.layers[name] = f"{name}.norm_alone"
            owner.add_module("norm_alone", _alone(owner))
        return self.layers[name]

    def uncounted(self, graph: fx.Graph) -> None:
        """Takes out, in place, that forward counts the batches, for the layers do so, too."""
        counters = {f"{name}.num_batches_tracked" for name in self.layers}
        for node in graph.find_nodes(op="call_method", target="add_"):
            counted: Any = node.args[0]
            if counted.op == "get_attr" and counted.target in counters:
                graph.erase_node(node)


def _is(found: Any, owner: nn.Module, name: str, part: str) -> bool:
    """Returns whether an argument is that tensor of its owner, or both are None."""
    if getattr(owner, part) is None or found is None:
        return found is getattr(owner, part)
    return isinstance(found, fx.Node) and found.target == f"{name}.{part}"


def _alone(owner: Any) -> nn.Module:
    """Returns torch's own layer on the same tensors."""
    kind: Any = next(
        c for c in type(owner).__mro__ if c.__module__ == batchnorm.__name__
    )
    layer: nn.Module = kind(
        owner.num_features, owner.eps, owner.momentum, device="meta"
    )
    layer._parameters = dict(owner._parameters)
    layer._buffers = dict(owner._buffers)
    return layer.train(owner.training)
