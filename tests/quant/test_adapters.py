"""Files of adapters: what is none, and what cannot be the model's, is refused."""

import copy

import pytest
import torch
from torch import nn

from qtrain.backend.packed.lora import LoRALinear
from qtrain.quant.adapters import adapter_state, load_adapters


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """Returns what a file of adapters holds that are one layer's, and the model that takes it."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    sizes = dict(r=2, alpha=2.0, dropout=0.0)
    layer = LoRALinear(linear.weight, linear.bias, (4, 6), **sizes)
    model = nn.Sequential(layer)
    return adapter_state(model), model, tmp_path_factory.mktemp("adapters") / "x.pt"


def changed(state, **changes):
    """Returns the state with other adapters beside or in the place of its own."""
    return state | {"adapters": state["adapters"] | changes}


A, LAYER = "0.lora_a", "adapters"
DAMAGED = {
    "another pickle": lambda state: {"x": torch.zeros(1)},
    "no mapping": lambda state: [state],
    "a list of adapters": lambda state: state | {LAYER: [torch.zeros(2, 6)]},
    "a scale in words": lambda state: state | {"scaling": {"0": "one"}},
    "no base": lambda state: state | {"base": None},
    "complex": lambda state: changed(state, **{A: state[LAYER][A] * 1j}),
    "no tensor": lambda state: changed(state, **{A: 0.5}),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_holds_no_adapters_is_refused(tiny_file, damage):
    state, model, path = tiny_file
    torch.save(damage(state), path)
    with pytest.raises(ValueError, match=r"adapters=.*: not a readable file of adap"):
        load_adapters(model, path)


@pytest.mark.parametrize("count", [0, 5, 700])
def test_a_file_that_is_cut_off_is_refused(tiny_file, count):
    state, model, path = tiny_file
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:count])
    with pytest.raises(ValueError, match="not a readable file of adapters"):
        load_adapters(model, path)


@pytest.mark.parametrize(
    "adapters, told",
    [
        ({A: torch.full((2, 6), torch.nan)}, "0.lora_a has NaN or infinite numbers"),
        # Part of the base, which its digests do not protect from the file itself
        ({"0.bias": torch.ones(4)}, "trained on other layers: 0.bias is only there"),
        ({A: torch.zeros(3, 6)}, r"\(3, 6\) there and \(2, 6\) here; set quant.r"),
        ({A: torch.zeros(2, 7)}, r"\(2, 7\) there and \(2, 6\) here; use the model"),
        (
            {"0.lora_b": torch.zeros(5, 2)},
            r"\(5, 2\) there .* here; use the model of",
        ),
    ],
)
def test_adapters_that_cannot_be_its_own_change_nothing(tiny_file, adapters, told):
    state, model, path = tiny_file
    torch.save(changed(state, **adapters), path)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        load_adapters(model, path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_another_base_is_refused_where_it_is_trained_already(tiny_file):
    state, model, path = tiny_file
    torch.save(state, path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[3] += 1e-6
    with pytest.raises(
        ValueError, match=r"of another base: its 0\.bias differs from"
    ):
        load_adapters(other, path)
    load_adapters(other, path, is_rehearsal=True)
