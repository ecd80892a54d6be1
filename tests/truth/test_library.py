"""qtrain as a library: it is a guest in another program's process."""

import json
import os
import subprocess
import sys
from pathlib import Path

USERS = Path(__file__).parent / "users"
WORDS = [
    "model=mlp",
    "model.hidden=8",
    "model._target_=host.Watcher",
    "trainer=smoke",
    "logger=none",
]
WORDS += [
    "threads=1",
    "float_cache=null",
    "measure.repeats=2",
    "measure.batch_sizes=[1]",
]
HOST = """
import ctypes, signal, sys

class Library(ctypes.CDLL):
    asked = []

    def __getattr__(self, name):
        self.asked.append(name)
        return super().__getattr__(name)

ctypes.CDLL = Library

def mine(signum, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, mine)
signal.signal(signal.SIGTERM, mine)
import qtrain
qtrain.run(*sys.argv[1:], run_dir="run")
from host import SEEN
print("only mine:", SEEN == {mine}, signal.getsignal(signal.SIGINT) is mine)
print("mallopt:", Library.asked.count("mallopt"))
"""


def host(script, folder, *words):
    paths = os.pathsep.join([str(USERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", script, *WORDS, *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_run_leaves_its_hosts_signals_and_memory_alone(tmp_path):
    told = host(HOST, tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-2:] == ["only mine: True True", "mallopt: 0"]


STOPPED = """
import os, signal, sys
import host, qtrain
forward = host.Watcher.forward

def interrupt(self, x):
    if self.training and len(x) == 64:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
    return forward(self, x)

host.Watcher.forward = interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
try:
    qtrain.run(*sys.argv[1:], run_dir="run")
except KeyboardInterrupt as err:
    print("stopped at once:", type(err).__name__)
"""


def test_ctrl_c_in_a_host_is_the_hosts_and_the_report_says_so(tmp_path):
    told = host(STOPPED, tmp_path)
    assert told.stdout.splitlines()[-1] == "stopped at once: KeyboardInterrupt", (
        told.stderr
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["status"], report["error"]) == ("interrupted", "interrupted")


def test_a_script_without_a_guard_hears_of_it_at_once(tmp_path):
    """Each process imports the script anew: without a guard it would start runs, and die."""
    (tmp_path / "script.py").write_text(
        "import sys, qtrain\nqtrain.run(*sys.argv[1:], run_dir='run')\n"
    )
    paths = os.pathsep.join([str(USERS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "script.py", *WORDS, "trainer.devices=2"]
    told = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode != 0
    assert (
        "trainer.devices=2: a process could not be started" in told.stderr
        and "__main__" in told.stderr
    )
