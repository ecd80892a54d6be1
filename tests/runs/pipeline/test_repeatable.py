"""The same run twice is the same, and methods are compared from one float model."""

import pytest
import torch
from small_runs import COSINE, METHODS, QAT, execute

from qtrain.model.mlp import MLP
from qtrain.runs.checkpoint import load_weights


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_twice_is_the_same_bit_for_bit(base, tmp_path, method):
    arguments = (f"quant={method}", "model=convnet", "model.width=2", COSINE)
    first = base(*arguments)
    torch.rand(3)
    again = execute(tmp_path, *arguments)
    assert again.float == first.float
    assert again.quantized == first.quantized
    assert again.report.metrics == first.report.metrics
    assert again.report.qparams == first.report.qparams
    assert (again.folder / "examples.npz").read_bytes() == (
        first.folder / "examples.npz"
    ).read_bytes()
    times = {"latency_ms", "size_kb"}
    steps = [
        [
            {k: v for k, v in line.items() if k.split("/")[0] not in times}
            for line in r.lines
        ]
        for r in (first, again)
    ]
    assert steps[0] == steps[1]


def test_every_method_starts_from_the_same_float_model(base):
    assert len({base(f"quant={method}").float for method in METHODS}) == 1


def test_another_seed_changes_qat_too(base, tmp_path):
    checkpoint = f"checkpoint={base(QAT).folder / 'float.pt'}"
    runs = [
        execute(tmp_path / str(seed), QAT, checkpoint, f"seed={seed}")
        for seed in (0, 1)
    ]
    assert runs[0].float == runs[1].float
    assert runs[0].quantized != runs[1].quantized


def test_starts_from_a_checkpoint(base, tmp_path):
    trained = base("quant=ptq")
    run = execute(
        tmp_path, "quant=ptq", f"checkpoint={trained.folder / 'float.pt'}", "seed=5"
    )
    assert (trained.report.float_from, run.report.float_from) == (
        "training",
        "checkpoint",
    )
    assert run.float == trained.float and run.quantized == trained.quantized
    assert (
        run.report.time_s["float_training"]
        == 0
        < trained.report.time_s["float_training"]
    )
    assert not any("float/train_loss" in line for line in run.lines)


def test_no_training_is_a_choice(tmp_path):
    run = execute(tmp_path, "trainer.epochs=0", "seed=2")
    torch.manual_seed(2)
    expected = MLP(hidden=8, hidden_relu=True, output_relu=False)
    load_weights(
        found := MLP(hidden=8, hidden_relu=True, output_relu=False),
        tmp_path / "float.pt",
    )
    assert torch.equal(found.linear1.weight, expected.linear1.weight)
    assert run.report.status == "ok"
