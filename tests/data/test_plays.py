"""The plays that are held back are whole ones, and none of them is trained on at first."""

import lzma
from importlib.resources import files

import pytest
import torch

from qtrain.data.plays import SIZES, plays

OPTIONS = dict(tokenizer="bytes", context=64, stride=64, batch_size=32, device="cpu")
OPTIONS |= dict(eval_batch_size=32, val_fraction=0.1, test_fraction=0.2)


def content():
    path = files("qtrain.data") / "samples" / "shakespeare.txt.xz"
    return lzma.decompress(path.read_bytes())


@pytest.mark.parametrize("held_back", [1, 2, 9])
def test_plays_are_cut_at_their_ends(held_back):
    data, text = plays(held_back=held_back, **OPTIONS), content()
    known, own = (
        bytes(loader.tokens.tolist()) for loader in (data.train, data.finetune)
    )
    parts = [known, own, *(bytes(x.tokens.tolist()) for x in (data.val, data.test))]
    assert b"".join(parts) == text
    # An empty line, and no line of the play before
    assert known.endswith(b"\n\n") and not own.startswith(b"\n")
    assert len(known) == len(text) - sum(SIZES[-held_back:]) - (held_back - 1)
    assert data.for_finetuning is data.finetune


def test_other_plays_are_other_data():
    found = {plays(held_back=n, **OPTIONS).fingerprint for n in (1, 2)}
    assert len(found) == 2


def test_there_must_be_a_play_to_train_on():
    with pytest.raises(ValueError, match="held_back=10: must be a whole number"):
        plays(held_back=10, **OPTIONS)


def test_batches_are_of_the_play_held_back():
    data = plays(held_back=1, **OPTIONS)
    torch.manual_seed(0)
    inputs, targets = next(iter(data.for_finetuning))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in content()[-SIZES[-1] :]
