"""A transform, an observer, a backend and an exporter come from outside, through config alone."""

import json

import torch

import qtrain


def integers(run):
    model = qtrain.load(run.run_dir, trust=["outside"])
    return {
        n: m.weight().int_repr()
        for n, m in model.named_modules()
        if callable(getattr(m, "weight", None))
    }


def test_a_transform_changes_the_integers_that_are_converted(job, monkeypatch):
    plain = job("mlp", "model.hidden=8")
    halved = job(
        "mlp", "model.hidden=8", "quant.transforms=[{_target_: outside.parts.Halved}]"
    )
    assert plain.code == halved.code == 0, halved.text
    (noted,) = halved.report["transforms"]
    assert (
        noted["name"] == "halved"
        and noted["sqnr_db"]["after"] < noted["sqnr_db"]["before"]
    )
    assert plain.report["transforms"] == []
    before, after = integers(plain), integers(halved)
    for name, exact in before.items():
        expected = (2 * exact.int()).clamp(-128, 127)
        assert (after[name].int() - expected).abs().max() <= 1 and not torch.equal(
            after[name], exact
        )


def test_an_observer_and_a_transform_go_by_the_names_of_their_files(job, tmp_path):
    files = {
        "observer/own.yaml": "_target_: outside.parts.ThreeSigma\n_partial_: true\n",
        "transform/gentle.yaml": "_target_: outside.parts.Halved\nby: 1.1\n",
    }
    for name, text in files.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True)
        (tmp_path / "own" / name).write_text(text)
    names = [
        "quant.activation.observer=own",
        "quant.transforms=[gentle,correct_bias]",
    ]
    run = job("mlp", "--config-dir", str(tmp_path / "own"), "model.hidden=8", *names)
    assert run.code == 0, run.text
    assert run.report["quant"]["activation"]["observer"] == "three_sigma"
    assert [t["name"] for t in run.report["transforms"]] == ["halved", "correct_bias"]


def test_a_backend_lowers_and_settles_what_is_auto(job):
    run = job("mlp", "model.hidden=8", "quant.engine={_target_: outside.parts.Loud}")
    assert run.code == 0 and "lowering for loud" in run.text, run.text
    quant = run.report["quant"]
    assert (quant["engine"], quant["weight"]["granularity"]) == ("loud", "per_tensor")
    assert run.report["truth"]["fake_vs_quantized"]["max_steps"] == 0  # it is exact
    assert run.loss("fake") == run.loss("quantized")
    inputs = qtrain.sample_inputs(run.run_dir, trust=["outside"])
    assert qtrain.load(run.run_dir, trust=["outside"])(*inputs).shape == (
        len(inputs[0]),
        10,
    )


def test_an_exporter_writes_its_file_and_is_judged(job):
    run = job(
        "mlp",
        "model.hidden=8",
        "export=[{_target_: outside.parts.AsJson}, torch_export]",
    )
    assert run.code == 0, run.text
    found = run.report["exports"]
    assert set(json.loads((run.run_dir / found["as_json"]["file"]).read_text())) == {
        "linear1",
        "linear2",
        "linear3",
    }
    assert found["as_json"]["steps"] > 1 and found["torch_export"]["steps"] == 0
    assert (run.run_dir / "model.pt2").stat().st_size == found["torch_export"][
        "size_bytes"
    ]


def test_what_none_of_them_is_hears_what_is_allowed(job):
    run = job("mlp", "quant.transforms=[biases]", "export=[tflite]")
    assert (
        run.code == 1
        and "quant.transforms=biases: " in run.text
        and "correct_bias" in run.text
    )
    assert (
        "export=tflite: " in run.text
        and "torch_export" in run.text
        and "Traceback" not in run.text
    )
    run = job("mlp", "quant=weight_only", "export=[torch_export]")
    assert run.code == 1 and "use quant=ptq or qat" in run.text
    run = job("mlp", "quant.engine={_target_: torch.nn.ReLU}")
    assert (
        run.code == 1 and "quant.engine" in run.text and "Traceback" not in run.text
    )


def test_the_reference_runs_activations_of_four_bits(job):
    run = job(
        "mlp",
        "model.hidden=8",
        "quant.engine=reference",
        "quant.activation.bits=4",
        "quant.weight.bits=4",
    )
    assert run.code == 0, run.text
    assert (
        run.report["quant"]["simulated"] is False
        and run.report["size_bytes"]["quantized_file"] > 0
    )
    assert run.loss("fake") == run.loss("quantized")
    x = qtrain.sample_inputs(run.run_dir)
    assert qtrain.load(run.run_dir)(*x).isfinite().all()


def test_what_no_exporter_can_write_is_told_before_any_training(job):
    run = job(
        "mlp",
        "model.hidden=8",
        "quant.layers={linear1: llm_int8}",
        "export=[torch_export]",
    )
    assert (
        run.code == 1 and "export: torch.export cannot write this model: " in run.text
    )
    assert run.report["time_s"] == {} and not (run.run_dir / "metrics.jsonl").exists()
