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


def without(run_dir, name):
    """Returns copies of a run that have something else in the place of one of its files."""
    made = []
    for kind, make in NO_FILES.items():
        made.append(shutil.copytree(run_dir, run_dir.parent / f"{kind} for {name}"))
        (made[-1] / name).unlink()
        make(made[-1] / name)
    return made


def in_time(*words):
    """Returns what a process prints as errors that ends well, and soon."""
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def test_what_is_no_file_is_not_waited_for(run_dir):
    names = ["report.json", "quantized.pt"]
    runs = {name: without(run_dir, name) for name in names}
    told = in_time("-c", LOAD, *(run for made in runs.values() for run in made))
    for name, made in runs.items():
        for run in made:
            assert f"{run / name}: is no regular file" in told


def test_a_comparison_leaves_out_what_is_no_file(run_dir, kept):
    runs = without(run_dir, "examples.npz")
    told = in_time("-m", "qtrain.cli.compare", *runs, kept, "--baseline", kept)
    for run in runs:
        assert f"{run / 'examples.npz'}: is no regular file" in told


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
