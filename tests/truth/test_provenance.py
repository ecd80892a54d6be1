"""What a run reports of itself is what it was made from."""

import json

import pytest
from filelock import FileLock

from qtrain.cli import compare

SMALL = [
    "data._target_=augmented.noisy_digits",
    "model.hidden=16",
    "truth.on_failure=warn",
]
LONG = ["trainer.max_steps=null", "trainer.epochs=3", "trainer.save_every=2"]


def lines(run):
    return map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())


def test_a_quantized_file_that_is_larger_says_so_and_names_what_stays_float(job):
    run = job(
        "mlp", "model.hidden=2", "quant=dynamic", "quant.layers={linear1: float}"
    )
    sizes = run.report["size_bytes"]
    assert run.code == 0 and sizes["quantized_file"] > sizes["float_file"], run.text
    assert "the quantized file is LARGER than the float one" in run.text
    assert "the largest tensor that stays float is linear1.weight" in run.text
    assert "LARGER" not in job("mlp").text


def test_a_refused_second_start_leaves_the_first_ones_records(
    job, command, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", "1000")
        killed = job("mlp", *SMALL, *LONG, "seed=3")
    before = killed.report
    assert before["error"] == "SystemExit: killed"
    with FileLock(killed.run_dir / ".lock"):
        code, text = command(
            "model=convnet", "quant=qat", "seed=4", f"hydra.run.dir={killed.run_dir}"
        )
    assert code == 1 and "another process is at work there" in text
    monkeypatch.setenv("QTRAIN_TRUST", "augmented")
    code, text = command(f"resume={killed.run_dir}", "seed=3")
    assert code == 0 and "float: resumed after step" in text, text
    for key in ("name", "seed", "model", "overrides", "config"):
        assert killed.report[key] == before[key]
    assert (
        killed.report["quant"]["method"] == "ptq"
        and "seed=3" in killed.report["overrides"]
    )


def test_a_comparison_shows_how_a_killed_run_was_started(
    job, command, monkeypatch, capsys
):
    """And not the refused second start, which has rewritten Hydra's own record."""
    monkeypatch.setenv("DIES_AT", "1000")
    killed = job("mlp", *SMALL, *LONG, "seed=3")
    (killed.run_dir / "report.json").unlink()  # as SIGKILL leaves a run
    with FileLock(killed.run_dir / ".lock"):
        assert (
            command(
                "model=convnet",
                "quant=qat",
                "seed=4",
                f"hydra.run.dir={killed.run_dir}",
            )[0]
            == 1
        )
    assert "seed=4" in (killed.run_dir / ".hydra" / "overrides.yaml").read_text()
    monkeypatch.setattr("sys.argv", ["qtrain-compare", str(killed.run_dir)])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "no report" in line
    ]
    assert (
        "seed=3" in line
        and "trainer.epochs=3" in line
        and "seed=4" not in line
        and "convnet" not in line
    )


def test_a_float_model_trained_as_long_as_qat_stands_beside_it(job):
    """Both start from the same weights and take the same steps: only quantization differs."""
    runs = [
        job("mlp", "trainer.epochs=2", f"quant={method}")
        for method in ("float_finetuned", "qat")
    ]
    assert [run.code for run in runs] == [0, 0], runs[0].text
    exact, qat = (run.report for run in runs)
    assert exact["metrics"]["float"] == qat["metrics"]["float"]
    assert exact["metrics"]["quantized"]["loss"] < exact["metrics"]["float"]["loss"]
    assert exact["quant"]["weight"] is exact["metrics"]["fake"] is None
    rates = [
        [
            (line["step"], line[f"{stage}/lr"])
            for line in lines(run)
            if f"{stage}/lr" in line
        ]
        for run, stage in zip(runs, ("finetuning", "qat"), strict=True)
    ]
    assert rates[0] == rates[1] != []


@pytest.mark.parametrize(
    "dtype, largest",
    [("float32", "table"), ("float64", "table"), ("int64", "quant.scale")],
)
def test_the_largest_float_tensor_may_be_a_buffer_and_is_floating_point(
    job, dtype, largest
):
    """Neither whole numbers nor what the file leaves out."""
    run = job("nets.Table", dtype=dtype)
    assert run.code == 0, run.text
    assert run.report["coverage"]["largest_float"] == largest
