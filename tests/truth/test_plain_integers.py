"""quant.engine=int8: what is reported is what integers compute, on any machine."""

import json
import os
import subprocess
import sys

import pytest
import torch

import qtrain

INT8 = "quant.engine=int8"
BITS = {
    "W8A8": [],
    "W4A8": ["quant.weight.bits=4"],
    "W4A4": ["quant.weight.bits=4", "quant.activation.bits=4"],
    "W2A4": ["quant.weight.bits=2", "quant.activation.bits=4"],
}


def require_integers(run, most_gap=0.001):
    """Fails unless a run's int8 model is its simulation, layer by layer and in accuracy."""
    assert run.code == 0, run.text
    report = run.report
    assert report["quant"]["engine"] == "int8" and not report["quant"]["simulated"]
    assert report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    assert report["coverage"]["macs_quantized"] == 1
    assert report["size_bytes"]["quantized"] < 0.4 * report["size_bytes"]["float"]
    assert abs(run.accuracy("fake") - run.accuracy("quantized")) <= most_gap


@pytest.mark.parametrize("quant", ["ptq", "qat"])
@pytest.mark.parametrize("bits", BITS)
def test_fewer_bits_are_integers_too(job, quant, bits):
    run = job("mlp", INT8, f"quant={quant}", *BITS[bits])
    require_integers(run)
    weights = (int(bits[1]), int(bits[3]))
    quant = run.report["quant"]
    assert (quant["weight"]["bits"], quant["activation"]["bits"]) == weights


def test_a_unet_with_transposed_convolutions(job):
    run = job("unet.UNet", INT8, width=4)
    require_integers(run)
    assert run.report["coverage"]["float_layers"] == {
        "attention": "there is no Softmax on integers"
    }
    assert run.report["plan"]["up1"]["weight"]["granularity"] == "per_tensor"
    assert run.report["truth"]["min_sqnr_db"] > 15


def test_it_is_loaded_with_the_same_predictions(job, tmp_path):
    run = job("convnet", INT8)
    require_integers(run)
    inputs = qtrain.sample_inputs(run.run_dir)
    first, second = qtrain.load(run.run_dir), qtrain.load(run.run_dir)
    assert torch.equal(first(*inputs), second(*inputs))
    kinds = {x.dtype for x in first.state_dict().values()}
    assert kinds == {torch.int8, torch.float32, torch.int32}


def test_what_it_cannot_do_is_refused_by_name(job):
    asymmetric = job("mlp", INT8, "quant.weight.symmetric=false")
    assert asymmetric.code == 1
    assert "engine int8 takes weights without a zero point only" in asymmetric.text
    assert "Traceback" not in asymmetric.text


def test_the_weights_of_another_engine_are_refused_by_name(job):
    other, ours = job("mlp", "quant.engine=x86"), job("mlp", INT8)
    state = torch.load(other.run_dir / "quantized.pt", weights_only=True)
    with pytest.raises(ValueError, match="layer linear1 was saved by another engine"):
        qtrain.load(ours.run_dir).load_state_dict(state)


LOADS = """
import sys, torch, qtrain
model = qtrain.load(sys.argv[1])
torch.save(model(*qtrain.sample_inputs(sys.argv[1])), sys.argv[2])
"""


def without_vnni(*arguments, folder):
    """Runs a process whose oneDNN does without VNNI."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_model_for_all_256_integers_is_exact_without_vnni(job, tmp_path):
    run = job("mlp", INT8, "quant.activation.reduce_range=false")
    assert run.code == 0, run.text
    without_vnni(
        "-c", LOADS, str(run.run_dir), str(tmp_path / "output.pt"), folder=tmp_path
    )
    here = qtrain.load(run.run_dir)(*qtrain.sample_inputs(run.run_dir))
    there = torch.load(tmp_path / "output.pt")
    step = here.unique().diff().min()
    assert (here - there).abs().max() <= 1.01 * step  # a tie, if any
    assert (here != there).float().mean() < 0.01


def test_defaults_of_every_engine_hold_without_vnni(tmp_path):
    engines = [
        *(e for e in torch.backends.quantized.supported_engines if e != "none"),
        "int8",
    ]
    without_vnni(
        *(
            "-m",
            "qtrain.cli.run",
            "-m",
            "model=mlp",
            f"quant.engine={','.join(engines)}",
        ),
        *("trainer=smoke", "threads=1", "logger=none", "measure.repeats=2"),
        *(
            f"float_cache={tmp_path / 'cache'}",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ),
        folder=tmp_path,
    )
    reports = [
        json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/report.json")
    ]
    assert {report["quant"]["engine"] for report in reports} == set(engines)
    for report in reports:
        fake, real = (
            report["metrics"][kind]["accuracy"] for kind in ("fake", "quantized")
        )
        assert abs(fake - real) <= 0.001, report["quant"]["engine"]
        assert abs(report["metrics"]["float"]["accuracy"] - real) <= 0.005
