"""What people do with many runs: compare them by the command, and look at them in TensorBoard."""

import csv
import json
import sys

import pytest
from in_process import in_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from qtrain.cli import compare as cli

SWEEP = [
    "model=mlp",
    "trainer=smoke",
    "threads=1",
    "measure.repeats=2",
    "measure.batch_sizes=[1]",
    "calib_batches=4",
    "data.val_size=200",
    "data.test_size=400",
]


@pytest.fixture
def compare(capsys):
    """compare(*arguments): runs `qtrain-compare` in this process; returns (exit code, text)."""

    def run(*arguments):
        code = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        text = printed.out + printed.err
        return (1, f"{text}{code}") if isinstance(code, str) else (code, text)

    return run


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two rates and two seeds, PTQ and QAT; returns the folder of the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    varied = ["quant=ptq,qat", "seed=0,1", "optimizer.lr=0.001,0.003"]
    where = [
        f"hydra.sweep.dir={folder}/sweep",
        f"float_cache={folder}/cache",
        "logger=none",
    ]
    with in_process(folder) as run:
        assert run("-m", *SWEEP, *varied, *where) == 0
    return folder / "sweep"


def test_filters_hold_for_the_baseline(compare, sweep, tmp_path):
    """Each QAT run is held against PTQ of its seed, at the rate that the filter leaves."""
    table = tmp_path / "rows.csv"
    options = [
        "method=qat",
        "optimizer.lr=0.003",
        "--baseline",
        "method=ptq",
        "--csv",
        table,
    ]
    assert compare(sweep, *options)[0] == 0
    reports = [json.loads(path.read_text()) for path in sweep.glob("*/report.json")]
    found = {
        (r["quant"]["method"], r["seed"], r["config"]["optimizer"]["lr"]): r[
            "metrics"
        ]["quantized"]["accuracy"]
        for r in reports
    }
    assert len(rows(table)) == 2
    for row in rows(table):
        expected = (
            found["qat", int(row["seed"]), 0.003]
            - found["ptq", int(row["seed"]), 0.003]
        )
        assert float(row["baseline_difference"]) == pytest.approx(100 * expected)


def test_groups_over_seeds_can_be_sorted_corrected_and_typeset(
    compare, sweep, tmp_path
):
    files = [
        "--csv",
        tmp_path / "rows.csv",
        "--latex",
        tmp_path / "rows.tex",
        "--html",
        tmp_path / "rows.html",
    ]
    groups = ["--group-by", "method", "optimizer.lr", "--sort", "trainer.epochs"]
    assert compare(sweep, *groups, *files)[0] == 0
    assert [row["seeds"] for row in rows(tmp_path / "rows.csv")] == ["2"] * 4
    _, text = compare(
        sweep,
        "--group-by",
        "optimizer.lr",
        "--sort",
        "seed",
        "--csv",
        tmp_path / "rows.csv",
    )
    assert "2 groups" in text and "Holm p" in text
    for row in rows(tmp_path / "rows.csv"):
        assert float(row["difference_p"]) <= float(row["difference_p_holm"]) <= 1
    tex = (tmp_path / "rows.tex").read_text()
    assert tex.count(r" \\") == 5 and r"float \%" in tex  # the head and four rows
    page = (tmp_path / "rows.html").read_text()
    assert "by method, optimizer.lr" in page and '"name":"qat lr=0.003"' in page


@pytest.mark.parametrize(
    "key, near",
    [("methd", "method"), ("lr", "optimizer.lr"), ("quant.epoch", "quant.epochs")],
)
def test_a_misspelt_key_is_answered_with_the_nearest(compare, sweep, key, near):
    for arguments in (
        [f"{key}=1"],
        ["--sort", key],
        ["--group-by", key],
        ["--baseline", f"{key}=1"],
    ):
        code, text = compare(sweep, *arguments)
        first = next(
            line for line in text.splitlines() if "there is no such key" in line
        )
        assert code == 1 and near in first.split("nearest: ")[1].split(", ")


def test_data_of_one_name_are_told_apart_by_what_differs(
    compare, job, monkeypatch, tmp_path
):
    """By the setting that makes other images, though others differ too, as the batches' size."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_digits.py").write_text(
        "from qtrain.data.mnist import mnist_sample as digits\n"
    )
    (tmp_path / "conf" / "data").mkdir(parents=True)
    settings = "defaults: [mnist_sample, _self_]\n_target_: own_digits.digits\n"
    (tmp_path / "conf" / "data" / "own.yaml").write_text(settings)
    own = ["--config-dir", str(tmp_path / "conf"), "data=own", "quant=ptq"]
    runs = [
        job("mlp", *own, f"data.mean={mean}", f"data.batch_size={size}")
        for mean, size in ((0.1, 32), (0.2, 64))
    ]
    assert all(run.code == 0 for run in runs), runs[0].text
    _, text = compare(*(run.run_dir for run in runs))
    assert "mlp on own (data.mean=0.1): 1 run\n" in text
    assert "mlp on own (data.mean=0.2): 1 run\n" in text


def test_the_statistics_are_the_same_without_scipy(
    compare, sweep, tmp_path, monkeypatch
):
    special = pytest.importorskip("scipy.special")
    found = []
    for module in (special, None):
        monkeypatch.setitem(sys.modules, "scipy.special", module)
        compare(sweep, "--csv", tmp_path / "rows.csv")
        found.append(
            [float(row["difference_p"]) for row in rows(tmp_path / "rows.csv")]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def hparams(folder):
    found = {}
    for path in sorted(folder.glob("*/events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                content = value.metadata.plugin_data.content
                if value.tag == "_hparams_/session_start_info":
                    given = HParamsPluginData.FromString(
                        content
                    ).session_start_info.hparams
                    found[path.parent.name] = {
                        k: getattr(v, v.WhichOneof("kind")) for k, v in given.items()
                    }
    return list(found.values())


def test_what_a_sweep_varies_is_in_tensorboards_hparams(command, tmp_path):
    varied = ["trainer.clip_norm=null,1.0", "optimizer=adam,sgd"]
    code, text = command(
        "-m",
        *SWEEP,
        "quant=ptq",
        "logger.pictures=false",
        *varied,
        "float_cache=null",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    assert code == 0, text
    found = hparams(tmp_path / "sweep")
    assert (
        len(found)
        == 4
        == len({json.dumps(params, sort_keys=True) for params in found})
    )
    differing = {
        key for key in found[0] if len({params[key] for params in found}) > 1
    }
    assert differing == {"trainer.clip_norm", "optimizer", "rate"}
    assert all(
        (params["epochs"], params["batch size"]) == (1, 64) for params in found
    )


def test_tensorboard_has_the_accuracy_over_all_epochs(job):
    options = [
        "quant=qat",
        "quant.epochs=2",
        "trainer.epochs=3",
        "trainer.max_steps=null",
        "logger=tensorboard",
        "logger.pictures=false",
    ]
    run = job("mlp", *options)
    assert run.code == 0, run.text
    events = EventAccumulator(str(run.run_dir)).Reload()
    steps = {
        name: [event.step for event in events.Scalars(name)]
        for name in (
            f"{part}accuracy/{kind}"
            for part in ("val_", "")
            for kind in ("float", "fake", "quantized")
        )
    }
    assert steps == {
        **{
            "val_accuracy/float": [1, 2, 3],
            "val_accuracy/fake": [4, 5],
            "val_accuracy/quantized": [4, 5],
        },
        **{"accuracy/float": [5], "accuracy/fake": [5], "accuracy/quantized": [5]},
    }
    for kind in ("float", "fake", "quantized"):
        assert events.Scalars(f"accuracy/{kind}")[0].value == pytest.approx(
            run.accuracy(kind)
        )
