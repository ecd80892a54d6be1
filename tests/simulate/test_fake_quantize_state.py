"""The state of a fake-quantizer: saved, loaded, copied."""

import copy
import io

import pytest
import torch
from fake_quantizers import OBSERVERS, PER_TENSOR_ONLY, frozen, make


def reloaded(module, fresh):
    """`fresh` with the state of `module`, through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_state_dict_gives_the_same_module_back(name, granularity):
    if granularity == "per_channel" and name in PER_TENSOR_ONLY:
        pytest.skip("one range a tensor")
    how = {"observer": OBSERVERS[name], "granularity": granularity}
    module = make(**how)
    x, other = torch.randn(6, 7), torch.randn(6, 7) * 2
    module(x)
    copied = reloaded(module, make(**how))
    assert torch.equal(frozen(copied)(other), frozen(module)(other))
    assert copied.observed_range() == module.observed_range()
    for each in (module, copied):  # and it goes on from there
        each.observing = True
    assert torch.equal(copied(other * 3), module(other * 3))
    assert [len(q) for q in copied.calculate_qparams()] == [
        6 if granularity == "per_channel" else 1
    ] * 2


def test_what_was_observed_but_not_yet_asked_for_survives_saving():
    module = make(quantizing=False)  # as after calibration
    module(torch.linspace(-3, 5, 100))
    copied = reloaded(module, make(quantizing=False))
    assert copied.calculate_qparams() == module.calculate_qparams()


def test_a_scale_that_an_algorithm_chose_survives_saving():
    module, x = make(), torch.linspace(-3, 5, 100)
    module(x)
    module.stay(torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32))
    copied = reloaded(module, make())
    assert torch.equal(copied(x * 9), module(x * 9))
    assert copied.calculate_qparams() == module.calculate_qparams()
    assert not reloaded(make(observing=True), make()).stays


def test_what_was_never_observed_stays_an_error_after_loading():
    copied = reloaded(make(), make(observing=False))
    with pytest.raises(ValueError, match="did not during calibration"):
        copied(torch.ones(2))


def test_a_state_of_another_shape_replaces_that_of_a_module_in_use():
    module, other = make(granularity="per_channel"), make(granularity="per_channel")
    module(torch.randn(3, 5))
    other(torch.randn(7, 5))
    module.load_state_dict(other.state_dict())
    x = torch.randn(7, 5)
    assert torch.equal(frozen(module)(x), frozen(other)(x))


def test_a_copy_goes_its_own_way():
    module = make()
    module(torch.tensor([-1.0, 1.0]))
    copied = copy.deepcopy(module)
    copied(torch.tensor([-9.0, 9.0]))
    assert module.observed_range() == (-1.0, 1.0) and copied.observed_range() == (
        -9.0,
        9.0,
    )
    assert float(module.calculate_qparams()[0]) == pytest.approx(2 / 255)
