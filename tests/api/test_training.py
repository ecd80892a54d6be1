"""QAT in a loop of one's own is the command's, to the same integers."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import qtrain
from qtrain.data.mnist import mnist_sample
from qtrain.model.convnet import ConvNet

QUICK = [
    "threads=1",
    "logger=none",
    "float_cache=null",
    "measure.repeats=1",
    "measure.batch_sizes=[1]",
]
SMALL = ["model=convnet", "model.width=4", "model.hidden=8"]


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_a_plain_loop_ends_with_the_commands_integers(
    weight_bits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    qtrain.run(*SMALL, *QUICK, "quant=none", "trainer=smoke", run_dir="float")
    method = [
        "quant=qat",
        "quant.epochs=1",
        "quant.convert_every=0",
        "quant.scheduler=constant",
    ]
    start = [
        "checkpoint=float/float.pt",
        f"quant.weight.bits={weight_bits}",
        "seed=3",
    ]
    qtrain.run(*SMALL, *QUICK, *method, *start, run_dir="qat")

    torch.manual_seed(3)
    model = ConvNet(width=4, hidden=8)
    state = torch.get_rng_state()
    model.load_state_dict(torch.load("float/float.pt"))
    data = mnist_sample(
        batch_size=64,
        eval_batch_size=500,
        val_size=1000,
        mean=0.1307,
        std=0.3081,
        channels=1,
        device="cpu",
    )
    simulation = qtrain.prepare(
        model, islice(data.calib, 32), weight_bits=weight_bits
    )
    optimizer = torch.optim.Adam(simulation.parameters(), lr=1e-4, fused=True)
    torch.set_rng_state(state)
    for images, labels in data.train:
        loss = F.cross_entropy(simulation(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    int8 = qtrain.convert(simulation)

    theirs = qtrain.load("qat")
    for name in ("conv1", "conv2", "linear1", "linear2"):
        ours, expected = int8.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(ours.weight().int_repr(), expected.weight().int_repr())
        assert torch.equal(ours.bias(), expected.bias())
        assert (ours.scale, ours.zero_point) == (expected.scale, expected.zero_point)
