"""What stands in a run's file's place: no pipe is waited for, no link leads out of the folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run_dir(job, kept, tmp_path):
    """The folder of a finished run of an MLP, to be changed."""
    if not kept.exists():
        outcome = job("mlp", "model.hidden=4")
        assert outcome.code == 0, outcome.text
        shutil.copytree(outcome.run_dir, kept)
    return shutil.copytree(kept, tmp_path / "changed")


NO_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}
LOAD = """
import sys
import qtrain
for run in sys.argv[1:]:
    try:
        qtrain.load(run)
    except ValueError as err:
        print(err, file=sys.stderr)
    else:
        sys.exit("loaded")
"""


@pytest.mark.parametrize("name", ["report.json", "quantized.pt", "examples.npz"])
def test_what_is_no_file_is_not_waited_for(run_dir, kept, name):
    runs = [shutil.copytree(run_dir, run_dir.parent / kind) for kind in NO_FILES]
    for run, make in zip(runs, NO_FILES.values(), strict=True):
        (run / name).unlink()
        make(run / name)
    words = ["-c", LOAD, *runs]
    if name == "examples.npz":
        words = ["-m", "qtrain.cli.compare", *runs, kept, "--baseline", kept]
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60
    )
    for run in runs:
        assert f"{run / name}: is no regular file" in ended.stderr
    # The rest of the table stands
    assert ended.returncode == 0


@pytest.mark.parametrize("name", ["qtrain.log", "metrics.jsonl", "resume", ".lock"])
def test_no_link_leads_a_resumed_run_out_of_its_folder(
    run_dir, command, tmp_path, name
):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run_dir / "report.json").unlink()
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(outside)
    code, text = command(f"resume={run_dir}")
    assert code == 1 and f"{run_dir / name} is a symbolic link" in text
    assert outside.read_text() == "mine"
