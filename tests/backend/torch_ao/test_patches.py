"""Torch is changed in one place; with and without the change, int8 models put out the same."""

import hashlib
import os
import subprocess
import sys

SCRIPT = """
import hashlib, torch, qtrain
torch.set_num_threads(1)
from qtrain.model.convnet import ConvNet
torch.manual_seed(0)
images = torch.randn(8, 1, 28, 28)
net = ConvNet(width=4, hidden=8)
outputs = [qtrain.quantize(net, [images], method).model(images) for method in ("ptq", "dynamic")]
print(hasattr(torch.ScriptObject, "__torch_function__"))
print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in outputs)).hexdigest())
"""


def printed_with_torch_as_it_is():
    environment = os.environ | {
        "QTRAIN_PLAIN": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_outputs_are_the_same_with_torch_as_it_is(capsys):
    exec(SCRIPT, {})  # here, where qtrain has changed it
    changed, ours = capsys.readouterr().out.split()
    unchanged, theirs = printed_with_torch_as_it_is()
    assert (changed, unchanged) == ("True", "False")
    assert ours == theirs != hashlib.sha256(b"").hexdigest()
