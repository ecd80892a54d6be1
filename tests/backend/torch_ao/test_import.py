import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.ao.quantization as tq

import qtrain
from qtrain.backend import torch_ao


def test_torch_ao_is_imported_in_one_package_only():
    root = Path(qtrain.__file__).parent
    importers = {
        p.parent.name
        for p in root.rglob("*.py")
        if re.search(r"^\s*(import|from) torch\.ao", p.read_text(), re.M)
    }
    assert importers == {"torch_ao"}


def test_torchs_deprecation_is_silenced_for_qtrain_alone(mlp, make_ptq):
    make_ptq().prepare(mlp)  # warnings are errors here
    mlp.qconfig = tq.default_qconfig
    with pytest.warns(DeprecationWarning, match=torch_ao.DEPRECATED):
        tq.prepare(mlp)
    script = (
        "import warnings, torch.ao.quantization; before = list(warnings.filters); "
        "import qtrain.backend.torch_ao; "
    )
    check = [sys.executable, "-c", script + "assert before == list(warnings.filters)"]
    subprocess.run(
        check, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True
    )


def test_the_old_name_of_the_package_still_works_and_says_so():
    sys.modules.pop("qtrain.eager", None)
    with pytest.warns(
        FutureWarning,
        match="import QuantStub, DeQuantStub, FloatFunctional and fuse from qtrain",
    ):
        import qtrain.eager
    assert (
        qtrain.eager.QuantStub is qtrain.QuantStub
        and qtrain.eager.fuse is qtrain.fuse
    )
