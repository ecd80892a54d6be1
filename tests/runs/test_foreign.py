import pytest
import torch
from torch import nn

from qtrain.model.gpt2 import GPT2
from qtrain.runs.foreign import load_checkpoint, unwrap


def model(classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


def prefixed(prefix, found):
    return {f"{prefix}{key}": value for key, value in found.state_dict().items()}


def saved(tmp_path, content):
    path = tmp_path / "last.pt"
    torch.save(content, path)
    return path


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


WRAPPED = {
    "bare": lambda m: m.state_dict(),
    "lightning": lambda m: {
        "epoch": 3,
        "state_dict": prefixed("model.", m),
        "callbacks": {},
    },
    "another attribute": lambda m: {"state_dict": prefixed("net.", m)},
    "DataParallel": lambda m: prefixed("module.", m),
    "torch.compile": lambda m: prefixed("_orig_mod.", m),
    "both, in Lightning": lambda m: {
        "state_dict": prefixed("model.module._orig_mod.", m)
    },
    "nanoGPT": lambda m: {
        "model": prefixed("_orig_mod.", m),
        "iter_num": 5,
        "model_args": {},
    },
    "nested": lambda m: {"model": {"state_dict": m.state_dict()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_within_what_wraps_them(wrap, tmp_path):
    found = model(seed=1)
    notes = load_checkpoint(found, saved(tmp_path, wrap(model())), strict=True)
    assert same(found, model()) and bool(notes) == (wrap is not WRAPPED["bare"])


def test_a_part_of_the_model_that_was_compiled(tmp_path):
    state = {
        k.replace("0.", "0._orig_mod."): v for k, v in model().state_dict().items()
    }
    load_checkpoint(found := model(seed=1), saved(tmp_path, state), strict=True)
    assert same(found, model())


def test_half_precision_is_said(tmp_path):
    [note] = load_checkpoint(
        found := model(seed=1),
        saved(tmp_path, model().half().state_dict()),
        strict=True,
    )
    assert "torch.float16 weights" in note
    assert same(found, model().half().float())


def test_a_head_tied_to_the_embedding_is_saved_twice(tmp_path):
    sizes = {
        "vocab_size": 9,
        "n_positions": 4,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 4,
    }
    make = lambda: GPT2(**sizes, dropout=0.0, pretrained=None)  # noqa: E731
    state = prefixed("transformer.", make())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state = {k: v for k, v in state.items() if k != "transformer.lm_head.weight"}
    load_checkpoint(found := make(), saved(tmp_path, {"model": state}), strict=True)
    assert torch.equal(found.wte.weight, state["transformer.wte.weight"])
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(
        ValueError,
        match="wte.weight: one weight in the model, and several in the file",
    ):
        load_checkpoint(make(), saved(tmp_path, {"model": state}), strict=True)


def test_of_two_models_in_one_file_none_is_chosen(tmp_path):
    two = {
        "state_dict": prefixed("student.", model())
        | prefixed("teacher.", model(seed=1))
    }
    with pytest.raises(
        ValueError, match=r"several times, as student\., teacher\.; save one"
    ):
        load_checkpoint(model(), saved(tmp_path, two), strict=True)


def test_the_models_own_names_are_left_alone():
    own = {"module.weight": torch.ones(1), "weight": torch.zeros(1)}
    assert unwrap(own, own.keys(), "") == (own, [])


def test_a_head_of_another_size(tmp_path):
    path = saved(
        tmp_path, model(classes=5).state_dict() | {"loss.weight": torch.ones(5)}
    )
    with pytest.raises(
        ValueError, match=r"(?s)2\.weight.*checkpoint_strict=false leaves out"
    ):
        load_checkpoint(model(), path, strict=True)
    found, before = model(seed=1), model(seed=1)
    left_out, fresh = load_checkpoint(found, path, strict=False)
    assert left_out.endswith("left out: 2.weight, 2.bias, loss.weight")
    assert fresh.endswith("as the model was made: 2.weight, 2.bias")
    assert same(found[:2], model(classes=5)[:2]) and same(found[2], before[2])


def test_a_number_where_a_weight_belongs(tmp_path):
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(
            model(),
            saved(tmp_path, model().state_dict() | {"2.bias": 3}),
            strict=True,
        )


def test_nothing_fits(tmp_path):
    path = saved(tmp_path, nn.Conv2d(1, 2, 3).state_dict())
    with pytest.raises(ValueError, match="none of its weights fits the model"):
        load_checkpoint(model(), path, strict=False)


def test_code_is_not_run_and_the_way_out_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"save the weights alone: torch\.save\(model\.state_dict"
    ):
        load_checkpoint(model(), saved(tmp_path, {"model": nn.Linear}), strict=True)


def test_masks_of_older_files_are_no_weights(tmp_path):
    own = GPT2(vocab_size=20, n_positions=8, n_layer=2, n_head=2, n_embd=8)
    state = own.state_dict()
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(8, 8).tril().view(1, 1, 8, 8)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    found = GPT2(vocab_size=20, n_positions=8, n_layer=2, n_head=2, n_embd=8)
    [note] = load_checkpoint(found, saved(tmp_path, state), strict=True)
    assert "without the masks of attention" in note and same(found, own)


def test_transposed_weights_lead_to_the_reader_that_takes_them(tmp_path):
    own = GPT2(vocab_size=20, n_positions=8, n_layer=1, n_head=2, n_embd=8)
    state = {
        f"transformer.{name}": value.T if ".c_" in name and value.ndim == 2 else value
        for name, value in own.state_dict().items()
    }
    with pytest.raises(ValueError, match="lie transposed.*model.pretrained=FOLDER"):
        load_checkpoint(own, saved(tmp_path, state), strict=True)
