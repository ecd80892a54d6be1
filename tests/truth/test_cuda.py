"""On an NVIDIA GPU: calibration, training, conversion and resuming give what they give on the CPU.

.venv/bin/python -m pytest -m cuda
"""

import pytest
import torch

import qtrain

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no CUDA device"
    ),
]
CONVNET = ["model.width=4", "model.hidden=8"]


def integers(run):
    model = qtrain.load(run.run_dir)
    return {
        n: m.weight().int_repr().int()
        for n, m in model.named_modules()
        if callable(getattr(m, "weight", None))
    }


@pytest.fixture
def weights(job):
    """A trained float model's file, from which both devices start."""
    run = job("convnet", *CONVNET, "quant=none", "device=cpu")
    assert run.code == 0, run.text
    return f"checkpoint={run.run_dir / 'float.pt'}"


@pytest.mark.parametrize(
    "observer", ["minmax", "moving_average", "histogram", "percentile"]
)
def test_calibration_and_conversion_are_the_cpus(job, weights, observer):
    runs = {}
    for device in ("cpu", "cuda"):
        observers = f"quant.activation.observer={observer}"
        runs[device] = job(
            "convnet", *CONVNET, weights, f"device={device}", observers
        )
        assert runs[device].code == 0, runs[device].text
    ours, theirs = integers(runs["cuda"]), integers(runs["cpu"])
    for name, exact in theirs.items():
        assert (ours[name] - exact).abs().max() <= 1  # ties may fall either way
        assert (ours[name] != exact).float().mean() < 0.01
    for name, exact in runs["cpu"].report["qparams"].items():
        assert runs["cuda"].report["qparams"][name]["scale"] == pytest.approx(
            exact["scale"], rel=0.02
        )
    assert runs["cuda"].loss("quantized") == pytest.approx(
        runs["cpu"].loss("quantized"), rel=0.01
    )


@pytest.mark.parametrize("method", ["qat", "qat_low_bit"])
@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
def test_training_brings_the_loss_down_and_int8_keeps_it(
    job, weights, method, conv_bn
):
    settings = [
        f"quant={method}",
        f"quant.conv_bn={conv_bn}",
        "quant.epochs=1",
        "trainer.max_finetuning_steps=60",
    ]
    run = job("convnet", *CONVNET, weights, "device=cuda", *settings)
    assert run.code == 0, run.text
    assert run.loss("fake") < run.loss("float")
    assert run.loss("quantized") == pytest.approx(run.loss("fake"), rel=0.02)
    assert run.report["device"] == "cuda" and run.report["peak_memory_bytes"] > 0


def test_a_training_that_was_ended_goes_on_to_the_same_weights(
    job, command, weights, monkeypatch
):
    from qtrain.train.running_mean import RunningMean

    settings = [
        "quant=qat",
        "quant.epochs=1",
        "quant.convert_every=0",
        "trainer.max_finetuning_steps=8",
    ]
    whole = job("convnet", *CONVNET, weights, "device=cuda", *settings)
    assert whole.code == 0, whole.text
    add, count = RunningMean.add, []

    def broken(self, loss):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        add(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(RunningMean, "add", broken)
        ended = job(
            "convnet",
            *CONVNET,
            weights,
            "device=cuda",
            "trainer.save_every=2",
            *settings,
        )
    assert ended.code == 130, ended.text
    code, text = command(f"resume={ended.run_dir}")
    assert code == 0, text
    for name, exact in integers(whole).items():
        assert torch.equal(integers(ended)[name], exact)


def test_a_model_on_the_gpu_is_quantized_and_left_there():
    model = torch.nn.Sequential(
        qtrain.QuantStub(), torch.nn.Linear(8, 4), qtrain.DeQuantStub()
    ).cuda()
    batches = [torch.randn(16, 8, device="cuda")]
    found = qtrain.quantize(model, batches)
    assert next(model.parameters()).is_cuda
    assert found.model(batches[0].cpu()).shape == (16, 4)
    simulation = qtrain.prepare(model, batches)
    simulation(batches[0]).sum().backward()
    assert qtrain.convert(simulation)(batches[0].cpu()).isfinite().all()
