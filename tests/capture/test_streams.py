"""Sums that are read in float stay float; the others are rounded where integers are wanted."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.functional.spec import QuantSpec
from qtrain.quant.ptq import PTQ
from qtrain.quant.qat import QAT
from qtrain.simulate.simulation import Simulation

Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """Layers 8 wide, and a forward."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.gate = nn.Parameter(torch.full((8,), 0.5))
        self.token = nn.Parameter(torch.linspace(-0.02, 0.02, 8).view(1, 1, 8))
        self.clip = nn.Hardtanh(0.0, 0.1, inplace=True)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def pre_norm(m: Block, x: Tensor) -> Tensor:
    x = m.first(x)
    x = x + m.second(m.norm(x))
    return m.head(m.last(x))


def post_norm(m: Block, x: Tensor) -> Tensor:
    x = m.norm(m.first(x))
    x = m.last(x + m.second(x))
    return m.head(x)


def norm_in_the_branch(m: Block, x: Tensor) -> Tensor:
    x = m.first(x)
    x = x + m.norm(m.second(x))
    return m.head(m.last(x))


def gated(m: Block, x: Tensor) -> Tensor:
    x = m.first(x)
    x = x + m.gate * m.second(x)
    return m.head(m.last(x))


def with_token(m: Block, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.first(x)], 1)
    x = x + m.second(m.norm(x))
    return m.head(m.last(x)[:, 0])


def in_a_row(m: Block, x: Tensor) -> Tensor:
    x = m.first(x)
    x = x + m.second(x)
    x = (x + x.flip(1)).flatten(1).unflatten(1, (-1, 8))
    return m.head(m.last(x))


def read_by_softmax(m: Block, x: Tensor) -> Tensor:
    return m.head(torch.softmax(m.first(x) + m.second(x), -1))


def read_by_gelu(m: Block, x: Tensor) -> Tensor:
    return m.head(F.gelu(m.first(x) + m.gate))


def prepared(
    forward: Forward, **settings: object
) -> tuple[Simulation, Block, Tensor]:
    torch.manual_seed(0)
    model, x = Block(forward).eval(), torch.randn(16, 4, 8)
    quantizer = PTQ(engine="int8", **settings)  # type: ignore[arg-type]
    simulation = quantizer.prepare(model, (x,))
    quantizer.calibrate(simulation, [(x,)])
    return simulation, model, x


def rounded(simulation: Simulation) -> set[str]:
    """Returns the kinds of what is rounded, beside the layers with weights and the stubs."""
    kinds = {
        layer.kind for layer in simulation.plan.values() if layer.output is not None
    }
    return kinds - {"Linear", "QuantStub"}


@pytest.mark.parametrize(
    "forward",
    [
        pre_norm,
        post_norm,
        norm_in_the_branch,
        gated,
        with_token,
        read_by_softmax,
        read_by_gelu,
    ],
)
def test_a_sum_that_is_read_in_float_stays_float(forward: Forward) -> None:
    simulation, model, x = prepared(forward)
    assert not rounded(simulation) - {"LayerNorm"}
    assert {"first", "head"} <= set(simulation.plan)  # all products are in int8
    converted = simulation.convert()
    with torch.no_grad():
        exact, got = model(x), converted(x)
    assert (exact - got).norm() < 0.03 * exact.norm()


def test_two_sums_of_one_stream_both_stay() -> None:
    simulation, _, _ = prepared(in_a_row)
    assert not rounded(simulation)


def test_a_sum_whose_readers_take_integers_is_rounded() -> None:
    simulation, _, _ = prepared(lambda m, x: m.head(m.first(x) + m.second(m.last(x))))
    assert "FloatFunctional" in rounded(simulation)


def test_a_small_token_beside_large_patches_keeps_its_digits() -> None:
    """One scale for both would leave the token 0.02 / (1000 / 255) of a step: nothing."""

    def forward(m: Block, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1) * x[:, :1], 1000 * x], 1)
        x = x + m.gate
        return m.head(m.last(x)[:, 0])

    simulation, model, x = prepared(forward)
    with torch.no_grad():
        exact, got = model(x), simulation.convert()(x)
    assert (exact - got).norm() < 0.03 * exact.norm()


class PreActivation(nn.Module):
    """Sums that a batch-norm with ReLU reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.padded = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)
        x = x + self.padded(torch.relu(self.norm(x)))
        y: Tensor = self.padded(torch.relu(self.last(x)))
        return y


@pytest.mark.parametrize("engine", ["int8", "reference"])
def test_a_batch_norm_with_relu_reads_integers(engine: str) -> None:
    model = PreActivation().eval()
    simulation = PTQ(engine=engine).prepare(model, (torch.randn(2, 3, 6, 6),))
    assert {"add.functional", "add_2.functional", "norm"} <= set(simulation.plan)


class Grouped(PreActivation):
    """A sum that a layer without an int8 kernel reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.padded(self.norm(x + self.second(x)))
        return y


@pytest.mark.parametrize(("engine", "is_rounded"), [("int8", 0), ("reference", 1)])
def test_a_layer_without_a_kernel_reads_in_float(
    engine: str, is_rounded: bool
) -> None:
    model, x = Grouped().eval(), torch.randn(2, 3, 6, 6)
    assert ("add.functional" in PTQ(engine=engine).prepare(model, (x,)).plan) is bool(
        is_rounded
    )


@pytest.mark.parametrize("quantizer", [PTQ(engine="int8"), QAT(engine="int8")])
@pytest.mark.parametrize("kind", [lambda y: y, lambda y: OrderedDict(out=y)])
def test_who_is_given_the_output_reads_integers(
    quantizer: PTQ, kind: Callable[[Tensor], Tensor]
) -> None:
    model = Block(lambda m, x: kind(m.first(x) + m.second(x)))
    simulation = quantizer.prepare(model, (torch.randn(2, 4, 8),))
    assert "add.functional" in simulation.plan


def test_in_qat_too() -> None:
    torch.manual_seed(0)
    model, x = Block(pre_norm), torch.randn(16, 4, 8)
    simulation = QAT(engine="int8").prepare(model.train(), (x,))
    simulation.train()(x)
    assert not rounded(simulation)


def two_sums(m: Block, x: Tensor) -> Tensor:
    x = m.first(x)
    x = m.second(x) + x
    return m.head(m.second(x) + x)


def test_a_sum_told_to_stay_float_is_not_rounded_and_others_keep_names() -> None:
    before, _, _ = prepared(two_sums)
    assert {"add.functional", "add_2.functional"} <= set(before.plan)
    after, model, x = prepared(two_sums, layers={"add_2": "float"})
    assert "add.functional" in after.plan
    assert after.plan["add_2"].output is None
    assert after.plan["add_2"].reason == "set by quant.layers"
    both, _, _ = prepared(two_sums, layers={"*add*": "float"})
    assert both.plan["add"].output is None and both.plan["add_2"].output is None
    with torch.no_grad():
        exact = model(x)
        errors = [(s.convert()(x) - exact).norm() for s in (before, after, both)]
    assert errors[0] >= errors[1] > errors[2]


def test_a_layer_told_to_stay_float_hands_on_floats() -> None:
    after, _, _ = prepared(two_sums, layers={"second": "float"})
    assert after.plan["second"].output is None  # and so the sum behind it is float
    assert "add.functional" not in after.plan


def test_sums_can_be_named_beside_settings_of_linear_layers() -> None:
    """These are found in the model as it was before it is traced, where no sum has a name."""
    settings = {"add": "float", "head": "fp16", "second_2": {"bits": 4}}
    simulation, _, _ = prepared(two_sums, layers=settings)
    assert simulation.plan["add"].reason == "set by quant.layers"
    weight = simulation.plan["second_2"].weight
    assert isinstance(weight, QuantSpec) and weight.bits == 4


def test_a_pattern_that_meets_the_object_that_adds_leaves_the_sum_alone() -> None:
    settings = {"*on*": "float"}  # second, and add.functional
    simulation, _, _ = prepared(two_sums, layers=settings)
    assert simulation.plan["second"].reason == "set by quant.layers"
    sums = [x for x in simulation.plan.values() if x.kind == "FloatFunctional"]
    assert not any(x.reason for x in sums)


def test_a_sum_with_relu_that_is_changed_in_place_behind_stays_float() -> None:
    """Its kernel would hand on the sum as it was."""

    def forward(m: Block, x: Tensor) -> Tensor:
        x = torch.relu(m.first(x) + m.second(x))
        m.clip(x[:, 0])
        y: Tensor = m.head(x)
        return y

    simulation, model, x = prepared(forward)
    with torch.no_grad():
        exact, got = model(x), simulation.convert()(x)
    assert (exact - got).norm() < 0.03 * exact.norm()


def test_the_object_that_adds_has_no_float_form() -> None:
    with pytest.raises(
        ValueError, match="add.functional: is a FloatFunctional.*around"
    ):
        prepared(two_sums, layers={"add.functional": "float"})


def test_a_sum_that_is_float_already_need_not_be_told() -> None:
    with pytest.raises(ValueError, match="what is read in float is float already"):
        prepared(pre_norm, layers={"*add*": "float"})
