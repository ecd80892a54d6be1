"""Where the tensors of a user's model have gone, so that they can be brought back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Origin:
    """How one tensor of the user's model comes of the captured model's.

    Args:
        names: the tensors that it is made of.
        how: "same"; "transposed"; or "stacked", one behind the other.
    """

    names: tuple[str, ...]
    how: str = "same"

    def restored(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the user's tensor."""
        if self.how == "transposed":
            return tensors[0].T.contiguous()
        return torch.cat(list(tensors)) if self.how == "stacked" else tensors[0]


def stacked(names: list[str]) -> Origin:
    """Returns the origin of a tensor that was cut into several."""
    return Origin(tuple(names), "stacked")


def transposed(name: str) -> Origin:
    """Returns the origin of a matrix that was turned."""
    return Origin((name,), "transposed")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns {name: parameter or buffer}, each tied one under all of its names."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return dict(named)


class Home:
    """The state dict of a user's model, filled from the simulation that was made of it.

    Args:
        names: of the user's state dict.
        owned: {name in the user's model: the parameter or buffer, as an object}.
        origins: {name in the user's model: what of `owned` it may be made of}, where
            not of itself.
        model: of the simulation, which has taken these objects over.
    """

    def __init__(
        self,
        names: Iterable[str],
        owned: Mapping[str, Tensor],
        origins: Mapping[str, list[Origin]],
        model: nn.Module,
    ) -> None:
        there: dict[int, str] = {}
        for name, value in tensors(model).items():
            there.setdefault(id(value), name)
        self.found: dict[str, Origin] = {}
        self.unused: dict[str, Tensor] = {}
        self.lost: list[str] = []
        for name in names:
            ways = origins.get(name, [Origin((name,))])
            ways = [way for way in ways if all(part in owned for part in way.names)]
            for way in ways:
                places = [there.get(id(owned[part]), "") for part in way.names]
                if all(places):
                    self.found[name] = Origin(tuple(places), way.how)
                    break
            else:
                self._keep(name, ways, owned)

    def _keep(
        self, name: str, ways: list[Origin], owned: Mapping[str, Tensor]
    ) -> None:
        """Notes a tensor that the simulation does without, or that was worked into another."""
        if not ways:
            self.lost.append(name)
            return
        parts = [owned[part].detach().clone() for part in ways[0].names]
        self.unused[name] = ways[0].restored(parts)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the user's state dict out of the simulation's model as it is now.

        Raises:
            ValueError: some of it was worked into other tensors.
        """
        if self.lost:
            raise ValueError(
                f"float_state_dict: {', '.join(self.lost[:5])} were worked into other "
                "tensors when fuse_model fused for inference; "
                "use qtrain.prepare, or capture='trace'"
            )
        now = tensors(model)
        state = {name: value.clone() for name, value in self.unused.items()}
        for name, origin in self.found.items():
            parts = [now[part].detach().clone() for part in origin.names]
            state[name] = origin.restored(parts)
        return state
