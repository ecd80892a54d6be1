"""Products with an int8 matrix: the same whole numbers by every kernel that a machine may have."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from qtrain.backend.packed import int8_product
from qtrain.backend.packed.int8_product import FEW_ROWS, Int8Product, row_magnitudes
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec


@pytest.fixture(params=["this machine's", "fbgemm", "float32"])
def make(request, monkeypatch):
    """make(integers, scale): an Int8Product that uses that kernel."""
    if request.param != "this machine's":
        monkeypatch.setattr(int8_product, "has_onednn", lambda: False)
    if (
        request.param == "fbgemm"
        and "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("this build of torch has no fbgemm")

    if request.param == "float32":
        monkeypatch.setattr(int8_product, "has_fbgemm", lambda: False)
    return Int8Product


def integers(rows, columns=300):
    """Random ones, and the rows whose products are the largest there can be."""
    found = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    found[0], found[-1] = 127, -127
    return found


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_whole_products_are_exact(rows, make):
    a, b, scale = integers(rows), integers(11), torch.rand(11) + 0.5
    # Powers of 2: x itself is exact
    steps = torch.tensor([0.5, 2.0, 0.25])[torch.arange(rows) % 3][:, None]
    a[:, 0] = 127  # so that the step is the row's
    expected = (a.long() @ b.long().T).double() * steps * scale
    # Of a sum; float32 rounds by less than 2^-22 of it
    largest = 300 * 127**2 * steps * scale
    assert (
        (make(b, scale).whole(a * steps, row_magnitudes(a * steps)) - expected).abs()
        < 2**-22 * largest
    ).all()


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("scales", [1, 11])
def test_precise_products_are_exact_to_the_digits_of_x(rows, scales, make):
    b, scale = integers(11, 40), torch.rand(scales) + 0.5
    x = torch.randn(rows, 40) * torch.logspace(-20, 20, rows)[:, None]
    x[0, 1:] = x[0, 0] * 2**-6.5  # as far between two high digits as can be
    weight = b.double() * scale[:, None]
    worst = x.abs().amax(1, keepdim=True).double() * 2**-13.9 * weight.abs().sum(1)
    assert ((make(b, scale).precise(x) - x.double() @ weight.T).abs() <= worst).all()


def test_zeros_and_what_is_not_finite(make):
    product = make(integers(5, 8), torch.ones(1))
    for multiply in (lambda x: product.whole(x, row_magnitudes(x)), product.precise):
        assert not multiply(torch.zeros(2, 8)).any()
        assert not multiply(torch.full((1, 8), 1e-40)).abs().gt(1e-30).any()
        x = torch.ones(2, 8)
        x[0, 3] = torch.nan
        y = multiply(x)
        assert y[0].isnan().all() and y[1].isfinite().all()


def test_a_weight_that_changes_is_packed_anew_and_copies_stand_alone():
    spec = QuantSpec(bits=8, symmetric=True, granularity="per_channel")
    weight, other = (IntegerWeight(torch.randn(6, 10), spec) for _ in range(2))
    x = torch.randn(3, 10)
    before, copied = weight.matmul(x), copy.deepcopy(weight)
    assert (
        weight.product() is weight.product()
        and copied.product() is not weight.product()
    )
    weight.load_state_dict(other.state_dict())
    assert torch.equal(weight.matmul(x), other.matmul(x)) and torch.equal(
        copied.matmul(x), before
    )
    assert set(weight.state_dict()) == {"data", "scale"}


def test_only_symmetric_rows_of_one_scale_are_multiplied_as_integers():
    def product(**fields):
        return IntegerWeight(
            torch.randn(4, 8), QuantSpec(**{"symmetric": True, **fields})
        ).product()

    assert (
        product(granularity="per_channel") is not None
        and product(granularity="per_tensor", bits=4) is not None
    )
    assert product(granularity="per_channel", symmetric=False) is None
    assert product(granularity="per_group", group_size=4) is None


SATURATING = """
import torch
from qtrain.backend.packed.int8_product import Int8Product, row_magnitudes
x, weight = torch.ones(40, 64), torch.full((16, 64), 127, dtype=torch.int8)
product = Int8Product(weight, torch.ones(16))
found = [product.whole(x, row_magnitudes(x)), product.precise(x)]
print(*(one.min().item() for one in found))
"""


def test_where_onednn_saturates_another_kernel_multiplies():
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", SATURATING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["8128.0", "8128.0"], done.stderr
