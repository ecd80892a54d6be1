import copy
import json
import logging
import shutil

import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qtrain.runs.checkpoint import FloatCache, digest, load_weights, save_weights


def model(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ---- weights -------------------------------------------------------------------------------------


def test_weights_round_trip(tmp_path):
    path = tmp_path / "float.pt"
    size = save_weights(path, model(seed=0))
    assert size == path.stat().st_size
    other = model(seed=1)
    assert not same(other, model(seed=0))
    load_weights(other, path)
    assert same(other, model(seed=0))


def test_the_files_name_does_not_change_its_size(tmp_path):
    sizes = {
        save_weights(tmp_path / name, model())
        for name in ("a.pt", "a_name_of_some_forty_characters_or_so.pt")
    }
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param(b"", "not a readable state dict", id="empty"),
        pytest.param(
            b"accuracy,loss\n0.9,0.1\n", "not a readable state dict", id="text"
        ),
        pytest.param(b"PK\x03\x04", "not a readable state dict", id="cut_zip"),
        pytest.param(
            [torch.zeros(2)], "holds a list; allowed is a state dict", id="list"
        ),
        pytest.param(
            torch.zeros(2), "holds a Tensor; allowed is a state dict", id="tensor"
        ),
        pytest.param(
            model(9).state_dict(), "does not fit the model", id="other_width"
        ),
        pytest.param(
            nn.Linear(2, 2).state_dict(), "does not fit the model", id="other_layers"
        ),
        pytest.param(
            {"state_dict": model().state_dict()},
            "does not fit the model",
            id="nested",
        ),
        pytest.param({0: torch.zeros(2)}, "does not fit the model", id="numbered"),
        pytest.param(nn.Linear, "not a readable state dict", id="code"),
    ],
)
def test_what_is_no_checkpoint_of_this_model(tmp_path, content, reason):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(
        content, path
    )
    with pytest.raises(ValueError, match=reason) as caught:
        load_weights(model(), path)
    assert str(caught.value).startswith(f"checkpoint={path}: ")


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match="^checkpoint=.*/x.pt: there is no such file$"
    ):
        load_weights(model(), tmp_path / "x.pt")


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(share=st.floats(0, 0.9999))
def test_a_truncated_checkpoint(tmp_path, share):
    path = tmp_path / "x.pt"
    save_weights(path, model())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="not a readable state dict"):
        load_weights(model(), path)


# ---- float cache ---------------------------------------------------------------------------------


def test_digest():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    different = [
        {},
        {"a": 1},
        {"a": 2},
        {"a": "1"},
        {"a": None},
        {"a": [1]},
        ["a", 1],
        {"a": 1.5},
        {"b": 1},
    ]
    assert len({digest(content) for content in different}) == len(different)


@pytest.fixture
def entry(tmp_path):
    """A cache's entry that holds model(seed=0)."""
    cache = FloatCache(tmp_path / "cache", "key")
    assert cache.load(model()) is None
    cache.save(model(seed=0), {"seconds": 1.5})
    return cache


def test_cache_round_trip(entry, tmp_path):
    found = model(seed=1)
    assert FloatCache(tmp_path / "cache", "key").load(found) == {"seconds": 1.5}
    assert same(found, model(seed=0))
    assert FloatCache(tmp_path / "cache", "another key").load(model()) is None


def cut_weights(folder):
    (folder / "weights.pt").write_bytes((folder / "weights.pt").read_bytes()[:-1])


def flip_a_bit(folder):
    content = bytearray((folder / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.pt").write_bytes(content)


def swap_weights(folder):
    save_weights(folder / "weights.pt", model(seed=2))


def edit_meta(**changes):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
        kept = {key: value for key, value in meta.items() if value is not None}
        (folder / "meta.json").write_text(json.dumps(kept))

    return damage


def overwrite_meta(text):
    return lambda folder: (folder / "meta.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut_weights, id="weights_cut"),
        pytest.param(flip_a_bit, id="weights_with_another_bit"),
        pytest.param(swap_weights, id="weights_of_another_run"),
        pytest.param(
            lambda folder: (folder / "weights.pt").unlink(), id="weights_missing"
        ),
        pytest.param(overwrite_meta(""), id="meta_empty"),
        pytest.param(overwrite_meta('{"sha256"'), id="meta_cut"),
        pytest.param(edit_meta(sha256=None), id="meta_without_digest"),
        pytest.param(edit_meta(sha256="0"), id="meta_with_another_digest"),
        pytest.param(edit_meta(training=None), id="meta_without_training"),
        pytest.param(overwrite_meta("[]"), id="meta_is_a_list"),
    ],
)
def test_a_damaged_entry_is_reported_and_can_be_replaced(entry, caplog, damage):
    damage(entry.folder)
    target = model(seed=1)
    with caplog.at_level(logging.WARNING, "qtrain"):
        assert entry.load(target) is None
    assert "is damaged" in caplog.text and "will be trained again" in caplog.text
    assert str(entry.folder) in caplog.text
    assert same(target, model(seed=1))
    entry.save(model(seed=0), {"seconds": 2.0})
    assert entry.load(target) == {"seconds": 2.0}
    assert same(target, model(seed=0))


def test_an_entry_of_another_network_leaves_the_model_untrained(entry):
    # Its class was changed since
    changed = nn.Sequential(*model(seed=1), nn.Linear(2, 2))
    before = copy.deepcopy(changed)
    assert entry.load(changed) is None
    assert same(changed, before)


def test_an_entry_without_meta_is_none_yet(entry, caplog):
    (entry.folder / "meta.json").unlink()
    assert entry.load(model()) is None
    assert not caplog.messages


def test_a_save_that_fails_leaves_no_valid_entry(tmp_path, monkeypatch):
    def fail(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space left")

    cache = FloatCache(tmp_path, "key")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="could not be written.*no space left"):
        cache.save(model(), {"seconds": 1.0})
    assert cache.load(model()) is None


def test_a_save_that_is_broken_off_between_its_files_leaves_no_valid_entry(
    entry, monkeypatch
):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qtrain.runs.checkpoint.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        entry.save(model(seed=1), {"seconds": 1.0})
    assert entry.load(model()) is None


def test_an_entry_is_made_by_one_process_at_a_time(entry, tmp_path):
    other = FloatCache(tmp_path / "cache", "key")
    with entry.lock:
        with pytest.raises(Timeout), FileLock(other.folder / "lock", timeout=0):
            pass
        with FloatCache(tmp_path / "cache", "another key").lock.acquire(timeout=0):
            pass
    with other.lock.acquire(timeout=0):
        pass


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        FloatCache(tmp_path / "file", "key")


def test_a_cache_can_be_moved(entry, tmp_path):
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    assert FloatCache(tmp_path / "elsewhere", "key").load(model()) == {"seconds": 1.5}
