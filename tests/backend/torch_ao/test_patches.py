"""Torch is changed in one place; with and without the change, int8 models put out the same."""

import hashlib
import os
import subprocess
import sys

SCRIPT = """
import hashlib, torch, qtrain
from qtrain.model.convnet import ConvNet
torch.manual_seed(0)
images = torch.randn(8, 1, 28, 28)
net = ConvNet(width=4, hidden=8)
outputs = [qtrain.quantize(net, [images], method).model(images) for method in ("ptq", "dynamic")]
print(hasattr(torch.ScriptObject, "__torch_function__"))
print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in outputs)).hexdigest())
"""


def printed(plain):
    environment = os.environ | {
        "QTRAIN_PLAIN": plain,
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


def test_outputs_are_the_same_with_torch_as_it_is():
    (changed, ours), (unchanged, theirs) = printed("0"), printed("1")
    assert (changed, unchanged) == ("True", "False")
    assert ours == theirs != hashlib.sha256(b"").hexdigest()
