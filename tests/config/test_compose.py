"""Command lines, and the settings that they are composed to."""

import pytest
from hydra.core.hydra_config import HydraConfig

from qtrain.config.build import ConfigError, compose, hydra_arguments


@pytest.mark.parametrize(
    "ours, hydras",
    [
        (["qtrain"], ["qtrain"]),
        (["qtrain", "experiment=null", "seed=1"], ["qtrain", "seed=1"]),
        (["sweep=null", "experiment=seed_ptq"], ["experiment=seed_ptq"]),
        (["checkpoint=run (1).pt"], ["checkpoint='run (1).pt'"]),
        (["seed=choice(1,2)"], ["seed=choice(1,2)"]),
        (["quant.layers={linear1: float}"], ["++quant.layers={linear1: float}"]),
        (["quant.layers.linear1=float"], ["++quant.layers.linear1=float"]),
        (
            ["quant.layers={a: float, \"c*\": {bits: 4}, 'h.0.*':fp16}"],
            ["++quant.layers={a: float, c*: {bits: 4}, h.0.*:fp16}"],
        ),
        (
            ["+quant.layers.linear1=float", "quant.engine=x86"],
            ["+quant.layers.linear1=float", "quant.engine=x86"],
        ),
    ],
    ids=str,
)
def test_command_lines_that_hydra_does_not_take(ours, hydras):
    assert hydra_arguments(ours) == hydras


@pytest.mark.parametrize("quote", ["", '"', "'"], ids=["plain", "double", "single"])
def test_patterns_of_layers_may_be_quoted(quote):
    found = compose(
        f"quant.layers={{linear1: float, {quote}conv*{quote}: {{bits: 4}}}}"
    )
    assert found.quant.layers == {"linear1": "float", "conv*": {"bits": 4}}


def test_compose_is_plain_and_resolved():
    settings = compose(
        "quant=qat",
        "model=mlp",
        "quant.layers.linear1=float",
        "quant.layers.linear2.bits=4",
        "seed=7",
    )
    assert "hydra" not in settings and "experiment" not in settings
    assert (settings.name, settings.seed) == ("mlp_qat", 7)
    assert settings.choices == {
        "model": "mlp",
        "data": "mnist_sample",
        "quant": "qat",
    }
    assert settings.quant.layers == {"linear1": "float", "linear2": {"bits": 4}}
    assert "${" not in str(settings)
    assert compose().quant.layers == {}  # nothing stays behind


def test_an_observer_by_its_name():
    by_name = compose(
        "quant.weight.observer=moving_average", "quant.activation.observer=percentile"
    ).quant
    by_file = compose(
        "observer@quant.weight.observer=moving_average",
        "observer@quant.activation.observer=percentile",
    ).quant
    assert by_name == by_file
    assert by_name.activation.observer._target_.endswith("PercentileObserver")


def test_an_interpolation_that_leads_nowhere():
    with pytest.raises(ConfigError, match="nowhere"):
        compose("name=${nowhere}")


@pytest.mark.parametrize(
    "files",
    [["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.json"], []],
    ids=str,
)
def test_the_tokenizer_of_a_pretrained_folder_is_taken_from_it(tmp_path, files):
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    own = str(tmp_path) if files not in (["vocab.json"], []) else "bytes"
    words = ["model=gpt2", f"model.pretrained={tmp_path}"]
    for config in (compose(*words), compose(*words, "experiment=gpt2_weights")):
        assert config.data.tokenizer == config.task.tokenizer == own
    assert compose(*words, "data.tokenizer=gpt2").task.tokenizer == "gpt2"
    assert (
        compose("model=gpt2", "model.pretrained=gpt2-medium").data.tokenizer
        == "gpt2-medium"
    )
    assert compose("model=gpt2").data.tokenizer == "bytes"


def test_what_was_composed_leaves_hydra_as_it_was():
    before = HydraConfig.instance().cfg
    compose("model=mlp")
    assert HydraConfig.instance().cfg is before


@pytest.mark.parametrize(
    ("quant", "rate"), [("float_finetuned", 2e-3), ("qlora", 1e-2)]
)
def test_an_experiment_gives_each_method_its_own_rate(quant, rate):
    config = compose("experiment=gpt2_qlora", f"quant={quant}")
    assert config.quant.optimizer.lr == rate
    own = compose("experiment=gpt2_qlora", f"quant={quant}", "quant.optimizer.lr=0.5")
    assert own.quant.optimizer.lr == 0.5
