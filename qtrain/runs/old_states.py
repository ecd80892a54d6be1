"""The names of tensors in files of older versions."""

import re
from typing import Any

from torch import nn

from qtrain.simulate.points import leave_float, sites


def up_to_date_state(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a simulation by the names that `model` has now.

    0.1.0 simulated on torch.ao's modules. Of PTQ it wrote weights that were quantized
    already: their sites in `model` lose what would do it again.
    """
    own = model.state_dict()
    found = {}
    for key, value in state.items():
        new = key.replace(".activation_post_process.", ".output_q.").replace(
            ".weight_fake_quant.", ".weight_q."
        )
        if new not in own:
            # The first of a fused run
            new = re.sub(r"\.0\.(weight|bias)$", r".\1", new)
        if not new.endswith(".observer.eps"):
            found[new] = value
    for name, site in sites(model).items():
        if site.output_q is not None and f"{name}.output_q.scale" not in found:
            leave_float(model, name)  # it runs in float, which calibration found out
        if f"{name}.weight" in found and f"{name}.weight_q.scale" not in found:
            site.weight_q = None
    return found
