import json

import pytest
import torch

from qtrain.analyze.measure import BackgroundLoad, median_interval
from qtrain.cli import bench
from qtrain.config import build
from qtrain.runs import pipeline

QUICK = [
    "model=mlp",
    "model.hidden=4",
    "trainer=smoke",
    "threads=1",
    "logger=none",
    "float_cache=null",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a PTQ run and of one that is simulated."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in (("ptq", []), ("simulated", ["quant.activation.bits=4"])):
        (folder / name).mkdir()
        settings = build.compose(*QUICK, "quant=ptq", "measure.repeats=1", *overrides)
        pipeline.execute(settings, folder / name, [])
    return folder / "ptq", folder / "simulated"


def read(run):
    return json.loads((run / "report.json").read_text())


def test_measures_again_and_updates_the_reports(runs, capsys):
    before = [read(run) for run in runs]
    threads = torch.get_num_threads()
    bench.main(
        [
            *map(str, runs),
            "--batch-sizes",
            "1",
            "3",
            "--threads",
            "1",
            "2",
            "--repeats",
            "7",
            "--warmup",
            "1",
        ]
    )
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert (
        "1 thread, medians of 7" in printed
        and "2 threads" in printed
        and printed.count("  ptq\n") == 4
    )
    for run, old, is_simulated in zip(runs, before, (False, True), strict=True):
        new = read(run)
        assert [(row["threads"], row["batch"]) for row in new["bench"]] == [
            (1, 1),
            (1, 3),
            (2, 1),
            (2, 3),
        ]
        first = new["bench"][0]
        assert (
            first["float"]["low"]
            <= first["float"]["median"]
            <= first["float"]["high"]
        )
        assert new["latency_ms"]["float"] == {
            "1": first["float"],
            "3": new["bench"][1]["float"],
        }
        assert (
            (new["latency_ms"]["quantized"] is None)
            == is_simulated
            == ("quantized" not in first)
        )
        changed = {"bench", "latency_ms", "other_load", "threads"}
        assert all(new[key] == old[key] for key in old if key not in changed)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["NOWHERE"], "not readable"),
        (["RUN", "--batch-sizes", "0"], "--batch-sizes: must be at least 1"),
        (["RUN", "--threads", "0"], "--threads: must be at least 1"),
        (["RUN", "--repeats", "0"], "--repeats: must be at least 1"),
    ],
)
def test_mistakes(runs, tmp_path, arguments, words):
    named = {"RUN": str(runs[0]), "NOWHERE": str(tmp_path)}
    with pytest.raises(SystemExit) as caught:
        bench.main([named.get(argument, argument) for argument in arguments])
    assert words in str(caught.value)


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    trials = 2000
    for n in (20, 50):
        samples = torch.empty(trials, n).exponential_(generator=generator).double()
        found = [median_interval(sample) for sample in samples]
        held = (
            sum(f["low"] <= torch.log(torch.tensor(2.0)) <= f["high"] for f in found)
            / trials
        )
        assert 0.93 < held < 0.99


def test_one_value_is_its_own_interval():
    assert set(
        median_interval(torch.tensor([3.0], dtype=torch.float64)).values()
    ) == {3.0}


@pytest.mark.parametrize("busy, cores", [(200, 1.0), (100, 0.0), (90, 0.0)])
def test_the_load_of_others_is_what_this_process_did_not_use(
    monkeypatch, busy, cores
):
    """Of 1 s in which this process used 1 s of CPU time; `busy` counts ticks of 10 ms."""
    now = iter([(10.0, 5.0), (11.0, 5.0 + busy / 100 - 1.0)])
    monkeypatch.setattr(BackgroundLoad, "_now", staticmethod(lambda: next(now)))
    with BackgroundLoad() as others:
        pass
    assert others.cores == pytest.approx(cores)
    assert others.contended == (cores > 0.25)


def test_where_the_system_does_not_tell_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(
        BackgroundLoad, "_now", staticmethod(lambda: (0.0, float("nan")))
    )
    with BackgroundLoad() as others:
        pass
    assert others.cores is None and not others.contended
