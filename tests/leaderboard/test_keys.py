import pytest

from qtrain.leaderboard import keys
from qtrain.leaderboard.runs import find


@pytest.fixture
def grid(runs):
    """a: ptq 8/8, b: qat 8/8, c: ptq 4/8, d: dynamic 8/-, e: float, f: qat 8/4."""
    runs.write("a", lr=0.01, overrides=("trainer=smoke",))
    runs.write("b", method="qat", engine="qnnpack", seed=1, lr=0.001)
    runs.write("c", bits=(4, 8), observer="minmax")
    runs.write("d", method="dynamic", bits=(8, None))
    runs.none("e")
    runs.write("f", method="qat", bits=(8, 4), engine="fbgemm", seed=2)
    return find([runs.folder]).runs


@pytest.mark.parametrize(
    "filters, expected",
    [
        ("method=qat", "bf"),
        ("method=ptq,qat", "abcf"),
        ("method=float", "e"),
        ("quant=none", "e"),
        ("bits=8", "abd"),
        ("bits=8/8", "ab"),
        ("bits=4/8,8/-", "cd"),
        ("seed=1.0", "b"),
        ("optimizer.lr=1e-2", "a"),
        ("trainer=smoke", "a"),
        ("engine=null", "e"),
        ("method=ptq observer=histogram", "a"),
        ("coverage.macs_quantized=1", "abcdef"),
        ("simulated=false engine=x86 seed=0", "acd"),
    ],
)
def test_filters(grid, filters, expected):
    left = keys.select(grid, keys.parse_filters(filters.split()))
    assert "".join(run.folder.name for run in left) == expected


@pytest.mark.parametrize(
    "key, near",
    [
        ("methd", "method"),
        ("lr", "optimizer.lr"),
        ("optimiser.lr", "optimizer.lr"),
        ("quant.engin", "quant.engine"),
        ("tranier", "trainer"),
    ],
)
def test_unknown_key_names_the_nearest(grid, key, near):
    with pytest.raises(ValueError) as caught:
        keys.select(grid, {key: ["1"]})
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"filter {key}: there is no such key; nearest: ")
    assert near in first.split("nearest: ")[1].split(", ")
    assert "accuracy" in rest[0] and "trainer.clip_norm" not in "".join(rest)


def test_unknown_key_without_a_near_one_lists_the_known_ones(grid):
    with pytest.raises(ValueError) as caught:
        keys.select(grid, {"xyzzy": ["1"]})
    for known in ("accuracy", "optimizer.lr", "trainer", "trainer.clip_norm"):
        assert known in str(caught.value)
    assert "_target_" not in str(caught.value) and "nearest" not in str(caught.value)


def test_unknown_value_lists_the_values(grid):
    with pytest.raises(
        ValueError,
        match="method=foo: no run is left; there is dynamic, none, ptq, qat",
    ):
        keys.select(grid, {"method": ["foo"]})


@pytest.mark.parametrize("text", ["method", "=qat", "method="])
def test_filter_without_key_or_value(text):
    with pytest.raises(ValueError, match="write key=value"):
        keys.parse_filters([text])


def test_runs_without_a_result_stay_unless_something_speaks_against_them(runs):
    runs.fail("a", method="qat", seed=2)
    (runs.folder / "killed" / ".hydra").mkdir(parents=True)
    failures = find([runs.folder]).failures

    def left(**filters):
        return [run.folder.name for run in failures if keys.may_match(run, filters)]

    # The engine is not known yet
    assert left(method=["qat"], engine=["x86"]) == ["a", "killed"]
    assert left(method=["ptq"]) == ["killed"]


def test_a_setting_of_null_is_known(runs):
    runs.write("a", settings={"trainer": {"clip_norm": None}})
    (run,) = find([runs.folder]).runs
    assert keys.may_match(run, {"trainer.clip_norm": ["null"], "no.such.key": ["1"]})
    assert not keys.may_match(run, {"trainer.clip_norm": ["1.0"]})


def test_order_of_mixed_values():
    found = sorted(["b", None, 3, 0.5, "a", True], key=keys.order)
    assert found == [0.5, True, 3, "a", "b", None]
    assert sorted([1, None, 3], key=lambda x: keys.order(x, descending=True)) == [
        3,
        1,
        None,
    ]


def test_objects_are_shown_by_their_class_where_that_tells_them_apart(runs):
    gptq = {"_target_": "mypackage.GPTQ", "damping": 0.01}
    for name, transforms in {"a": [], "b": [gptq]}.items():
        runs.write(name, settings={"transforms": transforms})
    found = find([runs.folder]).runs
    assert keys.labels(found, "transforms") == ["[]", "[GPTQ]"]
    other = gptq | {"damping": 0.1}
    runs.write("c", settings={"transforms": [other]})
    found = find([runs.folder]).runs
    expected = ["[]", "[GPTQ(damping=0.01)]", "[GPTQ(damping=0.1)]"]
    assert keys.labels(found, "transforms") == expected
