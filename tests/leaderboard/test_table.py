import re

import pytest

from qtrain.cli.compare import compare


def read(text):
    """The first table of a console text, as a list of {header: cell}."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) == {"-", " "})
    edges = [match.span() for match in re.finditer("-+", lines[rule])]
    rows = [
        [line[start:end].strip() for start, end in edges]
        for line in [lines[rule - 1], *lines[rule + 1 :]]
        if line
    ]
    end = next(
        (i for i, line in enumerate(lines[rule + 1 :]) if not line), len(lines)
    )
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1 : end + 1]]


def test_the_table_of_the_default_job(runs):
    runs.none("float", size_kb=(833.5, 833.5), latency_ms=(0.4, 0.4), seconds=20.0)
    runs.write(
        "ptq",
        gained=1,
        lost=9,
        size_kb=(833.5, 218.7),
        latency_ms=(0.4, 0.5),
        seconds=5.0,
    )
    runs.write(
        "qat",
        gained=2,
        lost=3,
        method="qat",
        observer="minmax",
        size_kb=(833.5, 218.7),
        seconds=9.0,
    )
    text = compare([runs.folder]).text()
    assert text.startswith("convnet on mnist: 3 runs\n")
    exact, qat, ptq = read(text)
    unknown = dict.fromkeys(
        [
            "engine",
            "bits",
            "observer",
            "fake %",
            "int8 %",
            "to float ± se",
            "p",
            "Holm p",
            "size ratio",
        ],
        "-",
    )
    assert exact == unknown | {
        **{
            "method": "float",
            "float %": "99.00",
            "file KB": "833.5",
            "ms, batch 1": "0.400",
            "latency ratio": "-",
        },
        **{"float ms": "-", "seconds": "20.0", "front": "*"},
    }
    assert ptq == {
        **{
            "method": "ptq",
            "engine": "x86",
            "bits": "8/8",
            "observer": "histogram",
            "float %": "99.00",
        },
        # (1 - 9) of 1,000; p = 22/1024
        **{
            "fake %": "98.20",
            "int8 %": "98.20",
            "to float ± se": "-0.80 ± 0.32",
            "file KB": "218.7",
        },
        **{"p": "0.021", "Holm p": "0.043"},
        **{
            "size ratio": "0.26x",
            "float ms": "0.400",
            "ms, batch 1": "0.500",
            "latency ratio": "1.25x",
        },
        **{"seconds": "5.0", "front": ""},
    }
    assert (qat["observer"], qat["to float ± se"]) == ("minmax", "-0.10 ± 0.22 ~")
    assert "~: no significant difference (p >= 0.05, exact McNemar test" in text
    assert (
        "standard error" in text
        and "Pareto front of accuracy" in text
        and "(sim)" not in text
    )


def test_only_columns_that_tell_something(runs):
    for name, facts in {"a": {}, "b": {"seed": 1}}.items():
        runs.write(
            name,
            size_kb=(800.0, None),
            latency_ms=(0.4, None),
            simulated=True,
            bits=(4, 4),
            **facts,
        )
    first, second = read(compare([runs.folder]).text())
    assert list(first) == [
        *(
            "method",
            "engine",
            "bits",
            "observer",
            "seed",
            "float %",
            "fake %",
            "quantized %",
            "to float ± se",
        ),
        *("p", "seconds", "front"),
    ]
    assert first["quantized %"] == "99.00 (sim)"
    assert (first["seed"], second["seed"]) == ("0", "1")


def test_settings_that_vary_get_a_column(runs):
    runs.write(
        "a",
        lr=0.1,
        overrides=("optimizer.lr=0.1", "quant.start_epoch=null", "quant.engine=x86"),
    )
    runs.write(
        "b",
        lr=0.2,
        overrides=("optimizer.lr=0.2", "quant.start_epoch=0", "quant.engine=x86"),
    )
    runs.write("c", lr=0.2, overrides=("optimizer.lr=0.2", "calib_batches=4"))
    rows = read(compare([runs.folder], sort_by="optimizer.lr").text())
    shown = [
        (row["optimizer.lr"], row["quant.start_epoch"], row["calib_batches"])
        for row in rows
    ]
    assert shown == [("0.1", "null", "-"), ("0.2", "0", "-"), ("0.2", "-", "4")]
    assert "quant" not in rows[0] and "quant.engine" not in rows[0]


def test_p_beside_what_all_rows_of_the_table_make_of_it(runs):
    runs.write("a", lost=20)
    (row,) = read(compare([runs.folder]).text())
    # Of a single row they are the same
    assert row["p"] == "<0.001" and "Holm p" not in row
    runs.write("b", gained=1, lost=9, method="qat")
    runs.write("c", gained=3, lost=3, method="dynamic")
    text = compare([runs.folder], baseline=["method=qat"]).text()
    shown = {row["method"]: (row["p"], row["Holm p"]) for row in read(text)}
    assert shown == {
        "ptq": ("<0.001", "<0.001"),
        "qat": ("0.021", "0.043"),
        "dynamic": ("1.000", "1.000"),
    }
    assert [row["p to baseline"] for row in read(text) if row["method"] == "qat"] == [
        "-"
    ]
    assert "Holm p: corrected for all rows of its table" in text


def test_rows_that_look_alike_are_named(runs):
    runs.write("once")
    runs.write("again", gained=1)
    assert [row["run"] for row in read(compare([runs.folder]).text())] == [
        "again",
        "once",
    ]
    runs.write("own", name="my_experiment")
    assert {row["name"] for row in read(compare([runs.folder]).text())} == {
        "convnet_ptq",
        "my_experiment",
    }


def test_groups(runs):
    for seed, lost in enumerate([10, 20]):
        runs.write(f"a{seed}", lost=lost, seed=seed)
        runs.write(f"b{seed}", lost=lost, seed=seed, engine="qnnpack", method="qat")
    (row,) = read(compare([runs.folder], group_by=["data.batch_size"]).text())
    assert row["data.batch_size"] == "64"
    assert (row["runs"], row["seeds"]) == ("4", "2")
    assert row["int8 %"] == "97.50 ± 0.71"
    assert row["to float ± sd"] == "-1.50 ± 0.71 ~"


def test_perplexity_has_three_digits_and_no_percent(runs):
    import numpy as np

    losses = np.linspace(2, 3, 50, dtype=np.float32)
    runs.write("a", scores={"float": losses, "quantized": losses})
    (row,) = read(compare([runs.folder]).text())
    assert row["int8"] == row["float"] == f"{np.exp(2.5):.3f}"
    assert row["to float ± se"] == "+0.000 ± 0.000 ~"


@pytest.mark.parametrize(
    "bits, header",
    [
        ([(8, 8), (8, None)], "int8 %"),
        ([(8, 8), (4, 8)], "quantized %"),
        ([(16, None)], "quantized %"),
        ([], "quantized %"),
    ],
    ids=["int8", "4 bits too", "fp16", "float alone"],
)
def test_a_column_is_called_int8_where_its_rows_are(bits, header, runs):
    runs.none("float")
    runs.none("finetuned", method="float_finetuned")
    for index, number in enumerate(bits):
        runs.write(f"run{index}", bits=number)
    rows = read(compare([runs.folder]).text())
    assert all(header in row for row in rows)


@pytest.mark.parametrize("count, word", [(1, "run"), (2, "runs")])
def test_failures_follow_the_tables(runs, count, word):
    runs.write("ok")
    for i in range(count):
        runs.fail(f"bad{i}", "ValueError: first line\nsecond line")
    text = compare([runs.folder]).text()
    assert (
        f"{count} {word} without a result:\n"
        f"  {runs.folder}/bad0: ValueError: first line [quant=qat seed=0]\n" in text
    )
    assert "second line" not in text


def test_a_latency_beside_other_programs_is_marked(runs):
    runs.write("quiet", other_load=0.1, latency_ms=(0.4, 0.123))
    runs.write("busy", other_load=1.5, latency_ms=(0.4, 0.234), seed=1)
    text = compare([runs.folder]).text()
    assert (
        "0.400!" in text
        and "0.234!" in text
        and "0.123!" not in text
        and "!: measured while other programs used the CPU" in text
    )
    assert "!: measured" not in compare([runs.folder / "quiet"]).text()
    assert "!" in compare([runs.folder], group_by=["method"]).text()


RATIOS = {
    "size ratio": ("file KB", "float KB"),
    "latency ratio": ("ms, batch 1", "float ms"),
}


@pytest.mark.parametrize("group_by", [(), ("method",)], ids=["runs", "groups"])
def test_every_ratio_follows_from_its_own_row(runs, group_by):
    """As the float row's milliseconds do not, which were measured in another run."""
    runs.none("float", size_kb=(1000.0, 1000.0), latency_ms=(0.196, 0.196))
    runs.write("ptq", latency_ms=(0.234, 0.271), size_kb=(900.0, 300.0))
    runs.write("ptq1", latency_ms=(0.4, 0.1), size_kb=(700.0, 100.0), seed=1)
    exact, *rows = read(compare([runs.folder], group_by=group_by).text())
    assert [exact[ratio] for ratio in RATIOS] == ["-", "-"] and len(rows) == (
        1 if group_by else 2
    )
    for row in rows:
        for ratio, (part, whole) in RATIOS.items():
            assert float(row[ratio][:-1]) == pytest.approx(
                float(row[part]) / float(row[whole]), abs=0.007
            )
    if not group_by:
        assert {row["latency ratio"] for row in rows} == {"1.16x", "0.25x"}


def test_float_sizes_have_a_column_where_the_float_row_does_not_show_them(runs):
    runs.write("a", size_kb=(800.0, 200.0))
    assert read(compare([runs.folder]).text())[0]["float KB"] == "800.0"
    runs.none("f", size_kb=(800.0, 800.0))
    assert "float KB" not in compare([runs.folder]).text()


def test_the_legend_says_what_each_front_is_of(runs):
    exact = (
        "*: on the Pareto front of accuracy, size and latency of its table; "
        "sizes within 0.1% and latencies within 5% count as equal"
    )
    disturbed = (
        "*: on the Pareto front of accuracy and size alone "
        "in a table where a latency is marked !"
    )
    runs.write("quiet")
    text = compare([runs.folder]).text()
    assert exact in text and disturbed not in text
    runs.write("busy", model="mlp", other_load=1.0)
    text = compare([runs.folder]).text()
    assert exact in text and disturbed in text
    assert exact not in compare([runs.folder / "busy"]).text()
