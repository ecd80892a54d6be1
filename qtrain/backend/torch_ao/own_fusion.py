"""Fusing where torch.ao is gone: which layers go together, and a container that holds them."""

from torch import nn

from qtrain.simulate.fused import Fused

NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def fusible(kinds: list[type[nn.Module]]) -> int:
    """Returns how many layers of a run, from the first on, become one; 0 for none.

    >>> fusible([nn.Conv2d, nn.BatchNorm2d, nn.ReLU]), fusible([nn.Linear, nn.Linear])
    (3, 0)
    """
    if not kinds or kinds[0] not in NORMS:
        return 0
    is_plain = kinds[0] in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    end = 1 + (kinds[1:2] == [NORMS[kinds[0]]])
    has_relu = kinds[end : end + 1] == [nn.ReLU] and (
        is_plain or end == 1 and kinds[0] is nn.Linear
    )
    end += has_relu
    return end if end > 1 else 0


def fuse_run(model: nn.Module, names: list[str]) -> None:
    """Makes one layer of a run, in place; identities stand where the others were."""
    layers = [model.get_submodule(name) for name in names]
    fused = Fused(*layers)
    fused.train(layers[0].training)
    model.set_submodule(names[0], fused)
    for name in names[1:]:
        model.set_submodule(name, nn.Identity())
