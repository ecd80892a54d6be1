import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qtrain.cli.callbacks import Comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "make_runs", ROOT / "scripts" / "make_runs.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    scores = {"float": np.ones(50, np.uint8), "quantized": np.ones(50, np.uint8)}
    for number, method in enumerate(("ptq", "qat")):
        script.write_run(
            tmp_path / "sweep" / f"{number}_{method}", scores=scores, method=method
        )
    script.fail = lambda: script.write_failure(
        tmp_path / "sweep" / "2_bad", "ValueError: lr=-1: must be above 0"
    )
    return tmp_path / "sweep", script


def end(folder, tensorboard=False):
    config = OmegaConf.create(
        {
            "hydra": {"sweep": {"dir": str(folder)}},
            "logger": {"tensorboard": tensorboard},
        }
    )
    Comparison().on_multirun_end(config, config_name="config")


def test_prints_and_writes_the_comparison(sweep, capsys):
    folder, _ = sweep
    end(folder)
    out = capsys.readouterr().out
    assert "convnet on mnist: 2 runs" in out
    for name, start in {
        "csv": b"model,",
        "png": b"\x89PNG",
        "html": b"<!doctype html>",
    }.items():
        path = folder / f"comparison.{name}"
        assert path.read_bytes().startswith(start)
        assert str(path) in out
    assert '"link":"0_ptq/"' in (folder / "comparison.html").read_text()


@pytest.mark.parametrize("tensorboard", [True, False])
def test_the_plot_is_in_tensorboard_where_that_is_the_logger(sweep, tensorboard):
    folder, _ = sweep
    end(folder, tensorboard)
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["comparison"] * tensorboard
    if tensorboard:
        (image,) = events.Images("comparison")
        assert image.encoded_image_string == (folder / "comparison.png").read_bytes()


@pytest.mark.parametrize("how", ["failed", "killed", "broken"])
def test_a_job_without_a_result_makes_the_sweep_fail(sweep, capsys, how):
    folder, script = sweep
    if how == "failed":
        script.fail()
    elif how == "killed":
        (folder / "2_bad" / ".hydra").mkdir(parents=True)
    else:
        (folder / "2_bad").mkdir()
        (folder / "2_bad" / "report.json").write_text("{")
    with pytest.raises(SystemExit) as caught:
        end(folder)
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "convnet on mnist: 2 runs" in out and f"{folder}/2_bad" in out
    assert (folder / "comparison.html").exists()


def test_says_why_there_is_no_comparison(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        end(tmp_path)
    assert caught.value.code == 1
    assert "no runs there" in capsys.readouterr().out


def test_hydra_lets_the_exit_code_through_and_imports_nothing_slow(sweep, tmp_path):
    folder, script = sweep
    script.fail()
    (tmp_path / "config.yaml").write_text(
        f"hydra:\n  sweep: {{dir: {folder}}}\n"
        "  callbacks: {comparison: {_target_: qtrain.cli.callbacks.Comparison}}\n"
    )
    (tmp_path / "app.py").write_text(
        "import sys\nimport hydra\n"
        "@hydra.main(config_path='.', config_name='config', version_base='1.3')\n"
        "def job(config):\n"
        "    slow = {'torch', 'matplotlib', 'numpy', 'qtrain.cli.compare'} & set(sys.modules)\n"
        "    print('SLOW', slow)\n"
        "job()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, tmp_path / "app.py", "-m", "hydra.job.num=0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "SLOW set()" in done.stdout
    assert "lr=-1: must be above 0" in done.stdout and "Traceback" not in done.stderr
