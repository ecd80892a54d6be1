import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qtrain.cli import compare

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_runs.py"


@pytest.fixture
def write(tmp_path):
    spec = importlib.util.spec_from_file_location("make_runs", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def write(name, /, lost=0, **facts):
        exact, quantized = np.ones((2, 200), np.uint8)
        quantized[:lost] = 0
        return script.write_run(
            tmp_path / "runs" / name,
            scores={"float": exact, "quantized": quantized},
            **facts,
        )

    write.fail = lambda name, error: script.write_failure(
        tmp_path / "runs" / name, error
    )
    (tmp_path / "runs").mkdir()
    return write


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs the command where runs/ is; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            compare.main(line.split())
            code = 0
        except SystemExit as err:
            code = err.code
            if isinstance(code, str):  # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
        return code, *capsys.readouterr()

    return run


def test_folders_filters_and_options_in_any_order(write, command):
    write("a", lost=4, overrides=("x=1",))
    write("b", method="qat", engine="qnnpack", overrides=("x=2",))
    write("c", method="qat", lost=1, overrides=("x=3",))
    code, out, err = command(
        "runs method=qat --sort x engine=x86,qnnpack --csv out.csv"
    )
    assert (code, err) == (0, "")
    assert re.findall(r"^(\w+) +(\w+)", out, re.M)[2:4] == [
        ("qat", "qnnpack"),
        ("qat", "x86"),
    ]
    assert "ptq" not in out
    assert len(Path("out.csv").read_text().splitlines()) == 3
    assert (
        command("method=qat runs")[0] == command("--sort size runs/a runs/b")[0] == 0
    )


def test_writes_every_format(write, command):
    write("a")
    files = {
        "csv": "model,data,quality,method,",
        "json": "{",
        "markdown": "### convnet on mnist",
        "latex": "% \\usepackage{booktabs,graphicx}\n\\begin{table}",
        "html": "<!doctype html>",
        "plot": "\x89PNG",
    }
    line = " ".join(f"--{kind} new/{kind}.png" for kind in files)
    assert command(f"runs {line} --group-by method,engine seed")[0] == 0
    for kind, start in files.items():
        content = Path(f"new/{kind}.png").read_bytes().decode("latin-1")
        assert start in content[:200], kind


def test_an_empty_folder(command, write):
    code, out, err = command("runs")
    assert (code, out) == (1, "") and "error: runs: no runs there" in err
    assert "nowhere: there is no such folder" in command("nowhere")[2]


def test_broken_reports_are_named_and_skipped(write, command, tmp_path):
    write("good")
    for name, content in {
        "empty": "",
        "cut": '{"schema": 1, "sta',
        "partial": '{"schema": 1, "status": "ok"}',
    }.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "report.json").write_text(content)
    code, out, err = command("runs")
    assert code == 0 and "1 run\n" in out
    assert [line.split()[2:4] for line in err.splitlines()] == [
        ["skipped", f"runs/{name}/report.json:"]
        for name in ("cut", "empty", "partial")
    ]


def test_only_broken_reports(command, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "report.json").write_text("{")
    code, out, err = command("runs")
    assert (
        (code, out) == (1, "")
        and "no readable run" in err
        and "runs/report.json" in err
    )


def test_failed_runs_are_listed_and_do_not_fail_the_command(write, command):
    write("a")
    write.fail("b", "TruthError: conv1: 3 dB\nmore")
    code, out, _ = command("runs")
    assert code == 0
    assert out.endswith(
        "1 run without a result:\n  runs/b: TruthError: conv1: 3 dB [quant=qat seed=0]\n"
    )


def test_nothing_but_failed_runs(write, command):
    write.fail("b", "ValueError: no")
    code, out, _ = command("runs --html x.html")
    assert code == 1 and "runs/b: ValueError: no" in out
    assert "ValueError: no" in Path("x.html").read_text()


def test_different_data_sets_are_not_compared(write, command):
    write("a", data="mnist")
    write("b", data="mnist_sample")
    _, out, _ = command("runs")
    assert out.index("convnet on mnist: 1 run\n") < out.index(
        "convnet on mnist_sample: 1 run\n"
    )


def test_data_sets_of_one_name_and_other_content_are_not_compared(write, command):
    for name, content in (
        ("a", "0123456789"),
        ("b", "0123456789"),
        ("c", "abcdefghij"),
    ):
        write(name, data_fingerprint=content)
    _, out, _ = command("runs")
    assert (
        "convnet on mnist (content 01234567): 2 runs\n" in out
        and "convnet on mnist (content abcdefgh): 1 run\n" in out
    )


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "runs --sort acuracy",
            ["--sort acuracy: there is no such key; nearest: accuracy\n", "size_kb"],
        ),
        (
            "runs --group-by metod",
            ["--group-by metod: there is no such key; nearest: method, model\n"],
        ),
        (
            "runs --group-by method --sort lr",
            ["--sort lr: there is no such key; nearest: optimizer.lr\n"],
        ),
        (
            "runs metod=qat",
            [
                "filter metod: there is no such key; nearest: method, model\n",
                "every key of the config",
            ],
        ),
        (
            "runs xyzzy=1",
            [
                "filter xyzzy: there is no such key\n",
                "size_kb",
                "optimizer.lr",
                "trainer.epochs",
            ],
        ),
        ("runs method=lsq", ["method=lsq", "ptq"]),
        ("runs --baseline method=lsq", ["--baseline method=lsq", "ptq"]),
        ("method=ptq", ["name at least one folder"]),
        ("runs --csv runs", ["runs"]),
    ],
)
def test_mistakes_say_what_is_known(write, command, line, words):
    write("a")
    code, out, err = command(line)
    assert (code, out) == (1, "")
    assert err.startswith("qtrain-compare: error: ") and all(
        word in err for word in words
    )


def run_python(code, *args):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, env=environment
    )


def test_compares_without_torch(write, tmp_path):
    write("a")
    write("b", method="qat", lost=3)
    code = (
        "import sys; from qtrain.cli.compare import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = run_python(
        code,
        str(tmp_path / "runs"),
        "--baseline",
        "method=ptq",
        "--html",
        str(tmp_path / "x.html"),
    )
    assert done.returncode == 0, done.stderr.decode()[-300:]
    assert b"-1.50 \xc2\xb1" in done.stdout


def test_a_reader_that_stops_reading_is_no_error(write, tmp_path):
    write("a")
    code = (
        "import sys, os; os.close(0); sys.stdout.reconfigure(line_buffering=True); "
    )
    code += "from qtrain.cli.compare import main; "
    code += "r, w = os.pipe(); os.close(r); os.dup2(w, 1); main(sys.argv[1:])"
    done = run_python(code, str(tmp_path / "runs"))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_a_thousand_runs(tmp_path):
    subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "runs"],
        check=True,
        env=os.environ | {"PYTHONPATH": sys.path[0]},
    )
    code = """
import json, re, sys, time
from pathlib import Path
start = time.perf_counter()
from qtrain.cli.compare import main
main(sys.argv[1:])
# Not ru_maxrss: a child process begins with that of its parent.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([time.perf_counter() - start, peak / 1e6]), file=sys.stderr)
"""
    for options in (
        (),
        (
            "--baseline",
            "method=float",
            "--group-by",
            "method",
            "bits",
            "--html",
            str(tmp_path / "x.html"),
        ),
    ):
        done = run_python(code, str(tmp_path / "runs"), *options)
        seconds, megabytes = json.loads(done.stderr.splitlines()[-1])
        print(f"{options}: {seconds:.2f} s, {megabytes:.0f} MB")
        assert seconds < 5 and megabytes < 500
    assert (tmp_path / "x.html").stat().st_size < 5e6
