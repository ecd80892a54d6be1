"""Trained networks on quant.engine=int8 score as their simulations do, whatever the bits."""

import pytest
import torchvision

NETWORKS = {
    "mlp": {},
    "convnet": {},
    "resnet18": {},
    "mobilenet_v2": {},
    "mobilenet_v3_large": {},
    "shufflenet_v2_x1_0": {},
    "unet.UNet": {"width": 4},
}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A4": (2, 4)}
RUNS = [*(("ptq", bits) for bits in BITS), ("qat", "W4A4")]
COLOURED = ["data.channels=3", "data.size=32"]
TRAINER = ["trainer.epochs=3", "trainer.max_steps=300"]
TRAINER += ["trainer.max_finetuning_steps=60", "data.test_size=2000"]
LONGER = [
    "trainer.epochs=9",
    "trainer.max_steps=900",
]  # its batch-norms forget slowly
MOST_STEPS = 0.5
MOST_DIGITS = 2  # of 2,000, by which scores may differ: 0.1 points


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_they_score_as_their_simulations(name, job, tmp_path, record_property):
    settings = ["quant.engine=int8", f"float_cache={tmp_path}/cache", *TRAINER]
    is_torchvisions = hasattr(torchvision.models.quantization, name)
    if is_torchvisions:
        settings += COLOURED
        settings += [f"model._target_=torchvision.models.quantization.{name}"]
    if name == "mobilenet_v3_large":
        settings += LONGER
    for method, bits in RUNS:
        weight, activation = BITS[bits]
        run = job(
            "mobilenet_v2" if is_torchvisions else name,
            f"quant={method}",
            f"quant.weight.bits={weight}",
            f"quant.activation.bits={activation}",
            *settings,
            **NETWORKS[name],
        )
        assert run.code == 0, run.text
        right = [
            round(2000 * run.accuracy(k)) for k in ("float", "fake", "quantized")
        ]
        steps = run.report["truth"]["fake_vs_quantized"]["max_steps"]
        record_property(f"{name} {method} {bits}", (*right, steps))
        assert steps <= MOST_STEPS
        assert abs(right[2] - right[1]) <= MOST_DIGITS, (method, bits, right)


@pytest.mark.slow
def test_a_gpt2_has_the_perplexity_of_its_simulation(job, tmp_path, record_property):
    settings = ["data=shakespeare", "quant.engine=int8", "threads=1"]
    settings += [f"float_cache={tmp_path}/cache", "trainer.max_steps=300"]
    settings += ["trainer.max_finetuning_steps=60", "task.max_new_tokens=8"]
    for method, bits in RUNS:
        weight, activation = BITS[bits]
        run = job(
            "gpt2_nano",
            f"quant={method}",
            f"quant.weight.bits={weight}",
            f"quant.activation.bits={activation}",
            *settings,
        )
        assert run.code == 0, run.text
        losses = [run.loss(kind) for kind in ("float", "fake", "quantized")]
        steps = run.report["truth"]["fake_vs_quantized"]["max_steps"]
        record_property(f"gpt2_nano {method} {bits}", (*losses, steps))
        assert steps <= MOST_STEPS
        assert abs(losses[2] - losses[1]) <= 0.001 * losses[1], (method, bits, losses)
