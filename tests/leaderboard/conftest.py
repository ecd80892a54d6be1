import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_runs.py"


def right_or_wrong(gained, lost, wrong, n):
    """Scores of a float model, `wrong` at first, and a quantized: `gained`, `lost`."""
    exact = np.ones(n, np.uint8)
    exact[:wrong] = 0
    quantized = exact.copy()
    quantized[:gained] = 1
    quantized[n - lost :] = 0
    return {"float": exact, "fake": quantized, "quantized": quantized}


@pytest.fixture
def runs(tmp_path):
    """Writes runs below runs.folder: runs.write(name, gained=2, ...), none(), fail()."""
    spec = importlib.util.spec_from_file_location("make_runs", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def write(name, /, *, scores=None, gained=0, lost=0, wrong=10, n=1000, **facts):
        scores = scores or right_or_wrong(gained, lost, wrong, n)
        return script.write_run(tmp_path / "runs" / name, scores=scores, **facts)

    def fail(name, error="ValueError: no", /, **facts):
        return script.write_failure(tmp_path / "runs" / name, error, **facts)

    none = partial(
        write, method="none", bits=(None, None), engine=None, observer=None
    )
    (tmp_path / "runs").mkdir()
    return SimpleNamespace(
        folder=tmp_path / "runs", write=write, fail=fail, none=none
    )
