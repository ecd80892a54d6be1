"""Captured models go through pickles and to other processes, as any module does."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtrain

USERS = Path(__file__).parent / "users"


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(str(USERS))
    import plain

    torch.manual_seed(0)
    return plain


@pytest.mark.parametrize("name", ["Tokens", "Drops"])
def test_a_pickle_comes_back_to_the_same_bits(plain, name):
    x = torch.randn(4, 1, 28, 28)
    simulation = qtrain.prepare(getattr(plain, name)(), [x], engine="x86")
    again = pickle.loads(pickle.dumps(simulation))
    assert torch.equal(again.eval()(x), simulation.eval()(x))
    again.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in again.parameters())
    int8, file = qtrain.convert(simulation), io.BytesIO()
    torch.save(int8, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), int8(x))


@pytest.mark.slow
def test_two_ranks_train_one_model(tmp_path):
    path = os.pathsep.join([str(USERS), str(Path(qtrain.__file__).parents[1])])
    jobs = [
        subprocess.Popen(
            [sys.executable, str(USERS / "two_ranks.py"), str(rank), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    trained = [name for name in first if name.endswith(("weight", "bias"))]
    assert all(torch.equal(first[name], second[name]) for name in trained)
    outputs = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    assert outputs[0].isfinite().all()
    error = outputs[0] - outputs[1]
    assert error.norm() < 0.1 * outputs[0].norm()
