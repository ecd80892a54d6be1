"""A run's GPT-2 as a file for llama.cpp, and back as the model of another run."""

import pytest
import torch

import qtrain
from qtrain.cli import export as command_line

gguf = pytest.importorskip("gguf")

SMALL = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "data.context=32"]
TEXT = ["task=language_modeling", "data=shakespeare"]
INT4 = ["quant=weight_only_int4", "quant.embedding=int4"]


@pytest.mark.parametrize("method", [["quant=none"], INT4])
def test_a_run_writes_a_file_that_another_reads(job, tmp_path, method):
    run = job("gpt2_nano", *TEXT, *SMALL, *method, "export=[gguf]")
    assert run.code == 0, run.text
    path = run.run_dir / "model.gguf"
    section = run.report["exports"]["gguf"]
    assert (
        section["file"] == "model.gguf"
        and section["size_bytes"] == path.stat().st_size
    )
    assert section["steps"] < 0.05
    as_it_is = [f"model.pretrained={path}", "trainer.epochs=0", "quant=none"]
    again = job("gpt2", *TEXT, "data.context=32", *as_it_is)
    assert again.code == 0, again.text
    assert again.report["config"]["data"]["tokenizer"] == str(path)
    assert again.loss("float") == pytest.approx(run.loss("quantized"), rel=5e-3)
    if method == INT4:  # its integers are those of the file
        exact = qtrain.load(run.run_dir).h[0].mlp.c_fc.weight.dequantize()
        found = qtrain.load(again.run_dir).h[0].mlp.c_fc.weight
        assert torch.equal(found, exact)


def test_a_finished_run_is_exported_by_a_command(job, capsys, tmp_path):
    run = job("gpt2_nano", *TEXT, *SMALL, *INT4)
    assert run.code == 0, run.text
    command_line.main([str(run.run_dir), "--to", "gguf"])
    assert "model.gguf: 0." in capsys.readouterr().out
    path = tmp_path / "float.gguf"
    command_line.main(
        [str(run.run_dir), "--float", "--type", "f32", "--output", str(path)]
    )
    exact = qtrain.load_float(run.run_dir).state_dict()
    job_of_file = job(
        "gpt2", *TEXT, "data.context=32", f"model.pretrained={path}", "quant=none"
    )
    assert job_of_file.code == 0, job_of_file.text
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert (
        tensors["blk.1.ffn_up.weight"] == exact["h.1.mlp.c_fc.weight"].numpy()
    ).all()


def test_what_cannot_be_exported_is_refused_before_compute(job):
    wrong = {
        "quant=ptq": "a GGUF file holds quantized weights alone",
        "quant.transforms=[rotate]": "this one was rotated",
        "model.n_embd=48": "the rows of layer wte have 48 numbers",
        "quant.targets=[lm_head]": "this head has an adapter",
    }
    methods = {"quant=ptq": [], "quant.targets=[lm_head]": ["quant=lora"]}
    for setting, reason in wrong.items():
        method = methods.get(setting, ["quant=weight_only", "quant.layers={}"])
        run = job("gpt2_nano", *TEXT, *SMALL, *method, setting, "export=[gguf]")
        assert run.code == 1 and reason in run.text, run.text
        assert "epoch" not in run.text.split("error:")[-1]


def test_a_file_that_is_cut_off_or_missing_is_refused_before_compute(job, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    cases = {
        path: "is no whole GGUF file",
        tmp_path / "none.gguf": "there is no such file",
    }
    for name, reason in cases.items():
        run = job("gpt2", *TEXT, f"model.pretrained={name}", "quant=none")
        assert (
            run.code == 1
            and f"model.pretrained={name}" in run.text
            and reason in run.text
        )


def test_the_command_refuses_what_is_no_run(tmp_path):
    with pytest.raises(
        SystemExit, match=r"holds no report\.json; name the folder of a finished"
    ):
        command_line.main([str(tmp_path)])
