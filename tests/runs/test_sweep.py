import os
import tomllib
import warnings
from pathlib import Path

import hydra
import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from qtrain.cli.callbacks import Comparison
from qtrain.cli.errors import explain
from qtrain.config.build import config_dir
from qtrain.runs import sweep

CONF = Path(config_dir())
PRESETS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


# What Hydra's plugins name in their configs; test_the_plugins_are_those_that_are_known_here
TARGETS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "ray": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
}
DEFAULTS = {
    "joblib": {"n_jobs": -1},
    "ray": {"ray": {"init": {"address": None}, "remote": {}}},
}


@pytest.fixture
def settings(monkeypatch):
    """settings(*overrides): the config of a whole sweep, on a machine with 8 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def compose(*overrides):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", list(overrides), return_hydra_config=True)

    return compose


@pytest.fixture
def launched(settings):
    """launched(launcher, **settings): the same under a launcher, installed or not."""

    def make(launcher, overrides=(), **changes):
        config = settings(*overrides)
        OmegaConf.set_struct(config, False)
        if launcher != "basic":
            config.hydra.launcher = OmegaConf.merge(
                DEFAULTS.get(launcher, {}), {"_target_": TARGETS[launcher]}, changes
            )
        return config

    return make


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_starts_a_sweep_and_says_how(settings, preset):
    if preset == "optuna":
        pytest.importorskip(
            "hydra_plugins.hydra_optuna_sweeper", reason="needs the extra optuna"
        )
    config = settings(f"sweep={preset}")
    assert config.hydra.mode.name == "MULTIRUN" and config.hydra.sweeper.params
    assert (
        f"#   qtrain sweep={preset}"
        in (CONF / "sweep" / f"{preset}.yaml").read_text()
    )


def test_the_optuna_preset_does_not_warn(settings):
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="needs the extra optuna"
    )
    config = settings("sweep=optuna")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        Comparison().on_multirun_start(config)
        assert hydra.utils.instantiate(config.hydra.sweeper.sampler)
    assert not [
        warning for warning in caught if "multivariate" in str(warning.message)
    ]


@pytest.mark.parametrize(
    "choice", [f"launcher={name}" for name in TARGETS] + ["sweeper=optuna"]
)
def test_a_plugin_that_is_missing_is_named(settings, monkeypatch, choice):
    with pytest.raises(MissingConfigException) as caught:
        settings(f"hydra/{choice}_nope")  # no plugin has it
    caught.value.missing_cfg_file = caught.value.missing_cfg_file.removesuffix(
        "_nope"
    )
    extra = choice.partition("=")[2].partition("_")[0]
    assert (
        explain(caught.value)
        == f"hydra/{choice}: its plugin is not installed; pip install 'qtrain[{extra}]'"
    )


def test_an_option_that_no_extra_brings(settings):
    with pytest.raises(MissingConfigException) as caught:
        settings("hydra/launcher=nope")
    assert "pip" not in explain(caught.value) and "basic" in explain(caught.value)


def test_every_launcher_and_sweeper_is_an_extra():
    extras = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(sweep.EXTRAS) <= set(extras)
    assert all(f"hydra-{name}" in extras[name][0] for name in sweep.EXTRAS)


@pytest.mark.parametrize(
    "launcher, changes, overrides, jobs",
    [
        ("basic", {}, [], 1),
        ("joblib", {}, [], 8),
        ("joblib", {"n_jobs": 3}, [], 3),
        ("joblib", {"n_jobs": -2}, [], 7),
        ("submitit_local", {}, [], float("inf")),
        ("submitit_local", {}, ["hydra.sweeper.max_batch_size=4"], 4),
        ("submitit_slurm", {}, [], 1),
        ("ray", {}, [], 8),
        ("ray", {"ray": {"remote": {"num_cpus": 4}}}, [], 2),
        ("ray", {"ray": {"init": {"num_cpus": 2}}}, [], 2),
    ],
    ids=str,
)
def test_jobs_at_once(launched, launcher, changes, overrides, jobs):
    assert sweep.jobs_at_once(launched(launcher, overrides, **changes).hydra) == jobs


@pytest.mark.parametrize(
    "launcher, changes, overrides, words",
    [
        ("joblib", {}, [], None),
        ("basic", {}, ["threads=8"], None),
        (
            "joblib",
            {},
            ["threads=2"],
            "8 jobs at once with 2 threads each on 8 cores",
        ),
        ("joblib", {"n_jobs": 4}, ["threads=2"], None),
        ("submitit_local", {}, ["threads=2"], "hydra.sweeper.max_batch_size=4"),
    ],
    ids=str,
)
def test_jobs_that_would_fight_for_the_cores(
    launched, capsys, launcher, changes, overrides, words
):
    Comparison().on_multirun_start(launched(launcher, overrides, **changes))
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "1 job"
    assert (
        len(others) == 1 and others[0].startswith("warning: ") and words in others[0]
        if words
        else others == []
    )


@pytest.mark.parametrize("launcher", TARGETS)
def test_the_plugins_are_those_that_are_known_here(settings, launcher):
    pytest.importorskip(TARGETS[launcher].rpartition(".")[0])
    assert (
        settings(f"hydra/launcher={launcher}").hydra.launcher._target_
        == TARGETS[launcher]
    )
