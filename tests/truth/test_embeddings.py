"""Embeddings and tied heads have their policy: GPT-2 can be smaller than its Linear layers say."""

import json

import pytest

import qtrain

TEXT = [
    "task=language_modeling",
    "data=shakespeare",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "data.val_fraction=0.01",
    "data.test_fraction=0.01",
    "data.val_fraction=0.01",
]
QAT = ["quant.epochs=1", "quant.convert_every=0"]


@pytest.mark.parametrize("method", ["ptq", "qat", "dynamic"])
def test_a_packed_embedding_makes_the_file_smaller_and_is_what_was_scored(
    job, method, tmp_path
):
    extra = [f"quant={method}", *(QAT if method == "qat" else [])]
    extra += ["calib_batches=4"] if method != "dynamic" else []
    extra.append(f"float_cache={tmp_path / 'float'}")  # one training for all
    files = {}
    for name, settings in {
        "float": [],
        "int8": ["quant.embedding=int8"],
        "shared": ["quant.embedding=int8", "quant.head=shared"],
        "int4": ["quant.embedding=int4", "quant.head=shared"],
    }.items():
        run = job("gpt2_nano", *TEXT, *extra, *settings)
        assert run.code == 0, run.text
        files[name] = run.report["size_bytes"]["quantized"]
        if method != "dynamic":  # which simulates nothing
            assert run.loss("fake") == pytest.approx(run.loss("quantized"), rel=1e-3)
        assert run.loss("quantized") == pytest.approx(run.loss("float"), rel=0.05)
        plan = run.report["plan"]
        if name != "float":
            assert plan["wte"]["weight"]["bits"] == (4 if name == "int4" else 8)
            assert plan["wte"]["kind"] == "Embedding"
        if name in ("shared", "int4"):
            assert plan["lm_head"]["weight_of"] == "wte"
        loaded = qtrain.load(run.run_dir)
        assert loaded(*qtrain.sample_inputs(run.run_dir)).isfinite().all()
    assert files["float"] > files["int8"] > files["shared"] > files["int4"]


def test_a_float_head_says_what_made_it_so(job):
    run = job("gpt2_nano", *TEXT, "quant.head=float")
    assert run.code == 0, run.text
    assert run.report["coverage"]["float_layers"]["lm_head"] == "set by quant.head"


def test_what_layers_says_of_an_embedding_or_a_head_comes_first(job):
    both = ["quant.embedding=int8", "quant.head=shared"]
    run = job(
        "gpt2_nano", *TEXT, *both, "quant.layers={wpe: float, lm_head: {bits: 4}}"
    )
    assert run.code == 0, run.text
    plan = run.report["plan"]
    assert plan["wte"]["weight"]["bits"] == 8 and "wpe" not in plan
    assert (
        plan["lm_head"]["weight"]["bits"] == 4
        and plan["lm_head"]["weight_of"] is None
    )


def test_a_policy_that_there_is_not_is_refused(job):
    run = job("gpt2_nano", *TEXT, "quant.embedding=int3", "quant.head=none")
    assert (
        run.code == 1
        and "quant.embedding=int3: allowed are" in run.text
        and "quant.head=none: " in run.text
    )


def test_a_policy_for_what_the_model_lacks_is_refused(job):
    run = job("mlp", "quant=ptq", "quant.embedding=int8", "quant.head=shared")
    assert run.code == 1
    assert "quant.embedding=int8: MLP has no Embedding; leave it out" in run.text
    assert "quant.head=shared: MLP has no Linear layer whose weight is" in run.text
    # What its own file says is no wish of the user's
    assert job("mlp", "quant=llm_int8", "quant.embedding=float").code == 0


@pytest.mark.parametrize("method", ["ptq", "dynamic", "weight_only"])
def test_a_layers_setting_for_an_embedding_is_sent_to_the_right_key(job, method):
    run = job("gpt2_nano", *TEXT, f"quant={method}", "quant.layers={wpe: fp16}")
    assert run.code == 1 and "quant.layers.wpe: is an embedding" in run.text
    assert "is said by quant.embedding; here only float has an effect" in run.text


def test_a_policy_for_some_models_of_a_sweep_costs_the_others_no_job(
    command, tmp_path
):
    quick = ["trainer=smoke", "threads=1", "logger=none", "float_cache=null"]
    quick += [
        "measure.repeats=2",
        "quant=ptq",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    _, text = command("-m", "model=mlp,convnet", "quant.embedding=int8", *quick)
    assert "quant.embedding=int8: ConvNet has no Embedding; leave it out" in text
    reports = (tmp_path / "sweep").glob("*/report.json")
    assert [json.loads(r.read_text())["status"] for r in reports] == ["ok", "ok"]
