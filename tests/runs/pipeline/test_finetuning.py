"""Fine-tuning: which epoch is kept, what settings it has, which bits are simulated."""

import pytest
from small_runs import COSINE, LONG, PER_TENSOR, QAT, compose, execute, int8_scores

from qtrain.runs import trainings


def test_the_best_int8_epoch_is_kept(base, tmp_path, monkeypatch):
    constant = (
        QAT,
        LONG,
        "scheduler@quant.scheduler=constant",
        "quant.convert_every=0",
    )
    after = {
        epochs: execute(tmp_path / str(epochs), *constant, f"quant.epochs={epochs}")
        for epochs in (1, 2, 3)
    }
    assert len({run.quantized for run in after.values()}) == 3

    def scripted(qualities):
        # The float model's comes first; behind each int8 model comes its simulation's, which
        # decides nothing.
        remaining = iter(
            [
                0.5,
                *(score for quality in qualities for score in (quality, 1 - quality)),
            ]
        )

        def val_scores(*_):
            return {"val_accuracy": next(remaining), "val_loss": 1.0}

        return val_scores

    # Of equals the later, which was trained longer.
    for qualities, best in (
        ([0.9, 0.2, 0.8], 1),
        ([0.1, 0.3, 0.2], 2),
        ([0.1, 0.2, 0.3], 3),
        ([0.4, 0.4, 0.1], 2),
    ):
        monkeypatch.setattr(trainings, "val_scores", scripted(qualities))
        run = execute(
            tmp_path / f"best_{qualities}",
            *constant,
            "quant.convert_every=1",
            "quant.epochs=3",
        )
        assert run.quantized == after[best].quantized
        assert [
            line["qat/int8_val_accuracy"]
            for line in run.lines
            if "qat/int8_val_accuracy" in line
        ] == qualities


def test_int8_is_scored_every_so_many_epochs(tmp_path):
    run = execute(tmp_path, QAT, LONG, "quant.epochs=5", "quant.convert_every=2")
    assert int8_scores(run) == [2 * 4, 4 * 4]


def test_qat_settings_are_its_own(tmp_path):
    run = execute(
        tmp_path,
        QAT,
        LONG,
        COSINE,
        "trainer.epochs=3",
        "quant.epochs=2",
        "optimizer.lr=0.1",
        "trainer.log_every=1",
    )
    steps = {
        stage: [line for line in run.lines if f"{stage}/lr" in line]
        for stage in ("float", "qat")
    }
    assert [len(lines) for lines in steps.values()] == [3 * 4, 2 * 4]
    assert max(line["float/lr"] for line in steps["float"]) == pytest.approx(0.1)
    assert max(line["qat/lr"] for line in steps["qat"]) == pytest.approx(
        compose(QAT).quant.optimizer.lr
    )


def test_fewer_bits_for_activations_are_simulated(base):
    for arguments in (
        ("quant.activation.bits=4",),
        (QAT, "quant.activation.bits=4", PER_TENSOR),
    ):
        report = base(*arguments).report
        assert report.quant["simulated"] is True
        assert report.metrics["quantized"] == report.metrics["fake"]
        sizes = (
            report.size_bytes["quantized"],
            report.size_bytes["quantized_file"],
            report.latency_ms["quantized"],
        )
        assert sizes == (None, None, None)


def test_qat_of_fewer_bits_is_simulated_per_channel(base):
    report = base(
        QAT, "quant.activation.bits=4", "quant.weight.granularity=per_channel"
    ).report
    assert report.quant["simulated"] is True
    assert set(report.qparams) == {"quant", "linear1", "linear2", "linear3"}
