"""Mistakes in settings are told by key and value with what is allowed, all at once."""

import pytest
import torch
from omegaconf import OmegaConf

from qtrain.config.build import ConfigError, build, compose, try_out


@pytest.mark.parametrize("name", ["nope", "''"])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_unknown_observer(role, name):
    with pytest.raises(ConfigError, match=rf"^quant\.{role}\.observer=") as caught:
        build(compose(f"quant.{role}.observer={name}"))
    assert (
        "allowed are histogram, minmax, moving_average, percentile, torch_ao_histogram"
        in str(caught.value)
    )


@pytest.fixture
def problems(composed):
    """problems("key=value", ...): the lines of what is wrong with such a config."""

    def build_with(*overrides, method="ptq"):
        settings = OmegaConf.merge(
            composed[method], OmegaConf.from_dotlist(list(overrides))
        )
        with pytest.raises(ConfigError) as caught:
            try_out(build(settings), settings)
        return str(caught.value).splitlines()

    return build_with


MISTAKES = {
    "seed=-1": "seed=-1: must be a whole number from 0 to",
    "seed=1.5": "seed=1.5: must be a whole number from 0 to",
    "threads=0": "threads=0: must be a whole number from 1 to 1024, or null",
    "calib_batches=0": "calib_batches=0: must be a whole number from 1 to 1000000, or null",
    "calib_split=dev": "calib_split=dev: allowed are train, val and test",
    "checkpoint=missing.pt": "checkpoint=missing.pt: there is no such file",
    "optimizer.lr=-0.1": "optimizer.lr=-0.1: must be a number above 0",
    "optimizer.lr=.nan": "optimizer.lr=nan: must be a number above 0",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number above 0",
    "data.batch_size=0": "data.batch_size=0: must be a whole number from 1 to",
    "data.channels=2": "data.channels=2: allowed are 1 and 3",
    "data.val_size=30": "data.val_size=30: must be a whole number from 0 to 29",
    "model.hidden=0": "model.hidden=0: must be a whole number from 1 to",
    "trainer.epochs=-1": "trainer.epochs=-1: must be a whole number from 0 to",
    "truth.on_failure=ignore": "truth.on_failure=ignore: allowed are error and warn",
    "quant.weight.bits=9": "quant.weight.bits=9: must be a whole number from 2 to 8",
    "quant.activation.bits=1": "quant.activation.bits=1: must be a whole number from 2 to 8",
    "quant.weight.symmetric=maybe": (
        "quant.weight.symmetric=maybe: allowed are true, false and auto"
    ),
    "quant.weight.granularity=per_row": (
        "quant.weight.granularity=per_row: allowed are per_tensor, per_channel"
    ),
    "quant.activation.granularity=per_channel": (
        "quant.activation.granularity=per_channel: activations have one scale"
    ),
    "quant.weight.group_size=4": (
        "quant.weight.group_size=4: is of granularity=per_group, and engine"
    ),
    "quant.weight.reduce_range=true": (
        "quant.weight.reduce_range=true: only activations are reduced; leave it at auto"
    ),
    "quant.weight.narrow_range=127": (
        "quant.weight.narrow_range=127: allowed are true, false and auto"
    ),
    "quant.activation.narrow_range=true": (
        "quant.activation.narrow_range=true: is for weights, whose integers are"
    ),
    "quant.activation.group_size=4": (
        "quant.activation.group_size=4: activations have one scale a tensor"
    ),
    "quant.engine=tensorrt": (
        "quant.engine=tensorrt: allowed are auto, int8, reference, fbgemm, qnnpack, x86, onednn"
    ),
    "quant.layers.linear1=int8": (
        "quant.layers.linear1=int8: must be float, fp16, weight_only, llm_int8, nf4, fp4, or"
    ),
    "quant.layers.linear1.bits=9": (
        "quant.layers.linear1.bits=9: must be a whole number from 2 to 8"
    ),
    "trainer.momentum=1": (
        "trainer: Trainer.__init__() got an unexpected keyword argument 'momentum'"
    ),
    "optimizer.momentum=1": (
        "optimizer: Adam.__init__() got an unexpected keyword argument 'momentum'"
    ),
    "model._target_=qtrain.model.mlp.Nope": "model: Error loading 'qtrain.model.mlp.Nope'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes(problems, override):
    assert problems(override)[0].startswith(MISTAKES[override])


@pytest.mark.parametrize("name", ["histogram", "percentile"])
def test_an_observer_that_knows_no_channels(name):
    with pytest.raises(ConfigError) as caught:
        build(
            compose(
                f"quant.weight.observer={name}",
                "quant.weight.granularity=per_channel",
                "data.val_size=0",
            )
        )
    assert str(caught.value) == (
        f"quant.weight.observer={name}: finds one range a tensor, not one a channel; "
        "use observer=minmax or moving_average, or granularity=per_tensor"
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["quant.epochs=0"], "quant.epochs=0: must be a whole number from 1 to"),
        (
            ["quant.convert_every=-1"],
            "quant.convert_every=-1: must be a whole number from 0 to 2",
        ),
        (
            ["quant.start_epoch=2"],
            "quant.start_epoch=2: must be a whole number from 0 to 1, or null",
        ),
        (
            ["quant.freeze_observers_epoch=-1"],
            "quant.freeze_observers_epoch=-1: must be a whole number from 0 to 1",
        ),
        (
            ["quant.freeze_batch_norm_epoch=9"],
            "quant.freeze_batch_norm_epoch=9: must be a whole number from 0 to 1",
        ),
        (
            ["quant.optimizer.lr=-1"],
            "quant.optimizer.lr=-1: must be a number above 0",
        ),
        (
            ["quant.scheduler.warmup=2"],
            "quant.scheduler.warmup=2: must be a number from 0 to 1",
        ),
        (
            ["data.val_size=0"],
            "quant.convert_every=1: the best epoch is chosen on validation data, and there is none",
        ),
    ],
    ids=str,
)
def test_mistakes_in_qat(problems, overrides, message):
    assert problems(*overrides, method="qat")[0].startswith(message)


def test_an_engine_that_this_machine_lacks(monkeypatch, problems):
    monkeypatch.setattr(
        type(torch.backends.quantized),
        "supported_engines",
        ["none", "qnnpack", "onednn"],
    )
    (line,) = problems("quant.engine=fbgemm")
    assert (
        line == "quant.engine=fbgemm: not supported by torch on this machine; "
        "here there are qnnpack, onednn"
    )


def test_an_engine_without_kernels_for_a_spec(monkeypatch, problems):
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", ["onednn"]
    )
    (line,) = problems("quant.engine=onednn", "quant.weight.symmetric=false")
    assert line.startswith(
        "quant.weight.symmetric=false: engine onednn takes weights without a zero point only"
    )
    assert "fbgemm, qnnpack, x86" in line


def test_all_mistakes_at_once(problems):
    wrong = [
        "seed=-3",
        "calib_batches=0",
        "calib_split=x",
        "optimizer.lr=-1",
        "data.batch_size=0",
        "data.std=0",
    ]
    wrong += [
        "quant.weight.bits=9",
        "trainer.epochs=-1",
        "trainer.log_every=0",
        "truth.samples=0",
        "model.hidden=0",
    ]
    found = problems(*wrong)
    assert {line.split(":")[0] for line in found} == set(wrong)
    assert len(found) == len(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        ["quant.weight.bits=9", "quant.activation.bits=1"],
        ["quant.weight.bits=9", "quant.engine=tensorrt"],
    ],
    ids=["two_specs", "spec_and_engine"],
)
def test_all_mistakes_at_once_also_these(machine, wrong):
    machine()
    with pytest.raises(ConfigError) as caught:
        build(compose(*wrong, "data.val_size=10"))
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == set(
        wrong
    )


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["quant.weight.observer=null"], "quant.weight.observer=None"),
        (["calib_split=val", "data.val_size=0"], "calib_split=val"),
        (["measure.repeats=0"], "measure.repeats=0"),
        (["measure.warmup=-1"], "measure.warmup=-1"),
        (["measure.batch_sizes=64"], "measure.batch_sizes=64"),
        (["measure.batch_sizes=[0]"], "measure.batch_sizes=[0]"),
        (["objective=[quantized.acuracy]"], "objective"),
        (["checkpoint=3"], "checkpoint=3"),
        (["data.mean=high"], "data.mean=high"),
    ],
    ids=str,
)
def test_mistakes_that_come_too_late(problems, overrides, key):
    assert any(line.startswith(key) for line in problems(*overrides))
