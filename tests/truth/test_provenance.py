"""What a run reports of itself is what it was made from."""

import pytest
from filelock import FileLock

SMALL = ["data._target_=augmented.noisy_digits", "model.hidden=16", "truth.on_failure=warn"]
LONG = ["trainer.max_steps=null", "trainer.epochs=3", "trainer.save_every=2"]


def test_a_quantized_file_that_is_larger_says_so_and_names_what_stays_float(job):
    run = job("mlp", "model.hidden=2", "quant=dynamic", "quant.layers={linear1: float}")
    sizes = run.report["size_bytes"]
    assert run.code == 0 and sizes["quantized_file"] > sizes["float_file"], run.text
    assert "the quantized file is LARGER than the float one" in run.text
    assert "the largest tensor that stays float is linear1.weight" in run.text
    assert "LARGER" not in job("mlp").text


def test_a_refused_second_start_leaves_the_first_ones_records(job, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", "1000")
        killed = job("mlp", *SMALL, *LONG, "seed=3")
    before = killed.report
    assert before["error"] == "SystemExit: killed"
    with FileLock(killed.run_dir / ".lock"):
        code, text = command("model=convnet", "quant=qat", "seed=4", f"hydra.run.dir={killed.run_dir}")
    assert code == 1 and "another process is at work there" in text
    monkeypatch.setenv("QTRAIN_TRUST", "augmented")
    code, text = command(f"resume={killed.run_dir}", "seed=3")
    assert code == 0 and "float: resumed after step" in text, text
    for key in ("name", "seed", "model", "overrides", "config"):
        assert killed.report[key] == before[key]
    assert killed.report["quant"]["method"] == "ptq" and "seed=3" in killed.report["overrides"]


@pytest.mark.parametrize("dtype, largest", [("float32", "table"), ("float64", "table"), ("int64", "quant.scale")])
def test_the_largest_float_tensor_may_be_a_buffer_and_is_floating_point(job, dtype, largest):
    """Neither whole numbers nor what the file leaves out."""
    run = job("nets.Table", dtype=dtype)
    assert run.code == 0, run.text
    assert run.report["coverage"]["largest_float"] == largest
