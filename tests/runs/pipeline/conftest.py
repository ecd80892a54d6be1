"""Small runs in place of real ones, each made once for all tests that only look at it."""

from functools import cache

import pytest
import torch
from small_runs import digits, execute

from qtrain.data.tensors import image_loaders


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """Few made-up digits, and no pictures, which would take most of the time."""
    train, test = digits(48), digits(48, seed=1)

    def small(root=None, **options):
        return image_loaders(train, test, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtrain.data.mnist.mnist_sample", small)
        patch.setattr("qtrain.data.mnist.mnist", small)
        patch.setattr("qtrain.logger.plots.weights", lambda *_: None)
        patch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def threads():
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(*overrides): such a run, made once for all tests that only look at it."""

    @cache
    def run(*overrides):
        return execute(tmp_path_factory.mktemp("base"), *overrides)

    return run
