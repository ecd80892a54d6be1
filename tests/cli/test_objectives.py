"""What a job returns to a sweeper that minimises or maximises it."""

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig

from qtrain.cli import run as cli
from qtrain.config.build import config_dir
from qtrain.runs import pipeline
from qtrain.runs.report import Report


@pytest.fixture
def job(monkeypatch, tmp_path):
    """job(*overrides, metrics=... or error=...): what a job returns to a sweeper, given these."""

    def call(*overrides, metrics=None, error=None):
        def execute(*_, **__):
            if error is not None:
                raise error
            config = {"measure": {"batch_sizes": [1, 64]}}
            report = Report(
                name="a", seed=0, config=config, overrides=[], model="b", data="c"
            )
            report.metrics, report.quality = metrics, "accuracy"
            report.size_bytes = {"quantized_file_at_bits": 2000}
            report.latency_ms = {"quantized": {"1": {"median": 0.5}}}
            return report

        monkeypatch.setattr(pipeline, "execute", execute)
        place = [f"hydra.runtime.output_dir={tmp_path}", "hydra.job.num=0"]
        with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
            settings = hydra.compose(
                "config", [*overrides, *place], return_hydra_config=True
            )
            HydraConfig.instance().set_config(settings)
            return cli.one_job(settings)

    return call


METRICS = {
    "float": {"accuracy": 0.9},
    "fake": None,
    "quantized": {"accuracy": 0.75, "loss": 1},
}
MULTIRUN, RUN = "hydra.mode=MULTIRUN", "hydra.mode=RUN"


def test_objectives(job):
    assert job(RUN, metrics=METRICS) == 0.75  # the task's own, of the converted model
    assert job(RUN, "objective=[quantized.loss,float.accuracy]", metrics=METRICS) == (
        1.0,
        0.9,
    )
    assert job(
        RUN, "objective=[quantized.accuracy,size_bytes,latency_ms]", metrics=METRICS
    ) == (
        0.75,
        2000,
        0.5,
    )


def test_a_job_of_a_sweep_that_fails_is_worth_nothing(job):
    assert job(MULTIRUN, error=RuntimeError("out of memory")) is None
    with pytest.raises(RuntimeError, match="out of memory"):
        job(RUN, error=RuntimeError("out of memory"))


@pytest.mark.parametrize("objective", ["fake.accuracy", "quantized.perplexity"])
def test_an_objective_that_a_job_does_not_have(job, objective):
    assert job(MULTIRUN, f"objective=[{objective}]", metrics=METRICS) is None


def test_one_objective_without_brackets(job):
    assert job(RUN, "objective=quantized.loss", metrics=METRICS) == 1.0
