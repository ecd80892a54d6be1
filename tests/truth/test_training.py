"""What training computes is what was asked for, whatever the user's own parts do."""

import pytest


@pytest.mark.parametrize("model, narrow", [("mlp", "true"), ("convnet", "false")])
def test_weights_written_past_autograd_are_quantized_anew(job, model, narrow):
    """Their integers stayed those of the first step if gradients were zeroed, not dropped."""
    plain = [
        f"quant.optimizer.{setting}"
        for setting in ("momentum=0", "weight_decay=0", "fused=false", "lr=0.05")
    ]
    qat = [
        "quant=qat",
        "optimizer@quant.optimizer=sgd",
        f"quant.weight.narrow_range={narrow}",
        "quant.epochs=1",
        *plain,
    ]
    targets = "torch.optim.SGD", "optimizers.PastAutograd"
    runs = [
        job(model, *qat, f"quant.optimizer._target_={target}", "trainer.max_steps=30")
        for target in targets
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].text
    assert runs[1].loss("fake") == pytest.approx(runs[0].loss("fake"), rel=1e-4)


@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_a_forward_that_changes_its_input_leaves_persistent_batches_alone(job, quant):
    """They are the same tensors in each epoch: changed each time they would drift away."""
    settings = [f"quant={quant}", "trainer.epochs=3", "trainer.max_steps=null"]
    runs = [
        job(
            "nets.ChangesItsInput",
            *settings,
            f"data._target_=datasets.{kind}_batches",
        )
        for kind in ("fresh", "kept")
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].text
    assert runs[1].loss("float") == pytest.approx(runs[0].loss("float"), rel=1e-6)
    assert runs[1].loss("quantized") == pytest.approx(
        runs[0].loss("quantized"), rel=1e-6
    )
