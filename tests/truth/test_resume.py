"""A run that was killed and resumed ends with the bits of one that was not, by any loader."""

import json

import pytest


def losses(run):
    lines = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if "loss" in key or key == "step"}
        for line in lines
    ]


@pytest.mark.parametrize("own_generator", [False, True])
# Each stage of a training takes 3 * 512 samples.
@pytest.mark.parametrize(
    "method, stage, dies_at",
    [
        ("qat", "float", 1000),
        ("qat", "qat", 2500),
        ("float_finetuned", "finetuning", 2500),
    ],
)
def test_a_dataloader_with_augmentation(
    job, command, monkeypatch, own_generator, method, stage, dies_at
):
    options = [
        "data._target_=augmented.noisy_digits",
        f"++data.own_generator={own_generator}",
        f"quant={method}",
    ]
    options += [
        "trainer.max_steps=null",
        "trainer.epochs=3",
        "quant.epochs=3",
        "trainer.save_every=2",
    ]
    options += ["model.hidden=16", "truth.on_failure=warn"]
    whole = job("mlp", *options)
    assert whole.code == 0, whole.text
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", str(dies_at))
        killed = job("mlp", *options)
    assert killed.code == 1 and killed.report["error"] == "SystemExit: killed"
    monkeypatch.setenv("QTRAIN_TRUST", "augmented")
    code, text = command(f"resume={killed.run_dir}")
    assert code == 0 and f"{stage}: resumed after step" in text, text
    for key in ("sha256", "metrics"):
        assert killed.report[key] == whole.report[key]
    assert losses(killed) == losses(whole)
