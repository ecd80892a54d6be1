"""The setting device, on machines with and without accelerators."""

import pytest

from qtrain.config.build import ConfigError, find_device


def test_auto_device(machine):
    for there, expected in (
        ({}, "cpu"),
        ({"mps": True}, "mps"),
        ({"cuda": True, "mps": True}, "cuda"),
    ):
        machine(**there)
        assert find_device("auto") == expected


def test_device_by_name(machine):
    machine(cuda=True)
    assert [find_device(name) for name in ("cpu", "cuda", "cuda:1")] == [
        "cpu",
        "cuda",
        "cuda:1",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "cuda",
        "cuda:1",
        "mps",
        "meta",
        "gpu",
        "",
        pytest.param(None),
    ],
)
def test_a_device_that_is_not_there(machine, name):
    machine()
    with pytest.raises(
        ConfigError, match=f"^device={name}: not usable here; allowed are auto, cpu$"
    ):
        find_device(name)
