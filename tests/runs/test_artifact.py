import numpy as np
import pytest
import torch
from torch import nn

import qtrain
from qtrain.config import build
from qtrain.data.tensors import image_loaders
from qtrain.runs import pipeline, stages

ENGINES = torch.backends.quantized.supported_engines
QUICK = [
    "trainer=smoke",
    "threads=1",
    "logger=none",
    "float_cache=null",
    "measure.repeats=1",
    "measure.warmup=0",
]
SMALL = ["data.val_size=16", "data.batch_size=8", "truth.on_failure=warn"]
CONVNET = "model=convnet model.width=2 model.hidden=8"
MLP = "model=mlp model.hidden=8"


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """Few made-up digits, and no pictures, which would take most of the time."""
    images = torch.randint(
        0,
        256,
        (96, 28, 28),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    labels = torch.arange(96) % 10
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8] //= 4

    def small(**options):
        return image_loaders(
            (images[:48], labels[:48]), (images[48:], labels[48:]), **options
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtrain.data.mnist.mnist_sample", small)
        patch.setattr("qtrain.logger.plots.weights", lambda *_: None)
        patch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(arguments): the folder of such a run, and the converted model that it saved there."""
    made = {}

    def run(arguments):
        if arguments not in made:
            folder, saved = tmp_path_factory.mktemp("run"), {}
            save = stages.save_weights
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    stages,
                    "save_weights",
                    lambda p, m: saved.update({p.name: m}) or save(p, m),
                )
                pipeline.execute(
                    build.compose(*QUICK, *SMALL, *arguments.split()), folder, []
                )
            made[arguments] = folder, saved["quantized.pt"]
        return made[arguments]

    return run


def on(engine, arguments):
    marks = (
        []
        if engine in ENGINES
        else [pytest.mark.skip(reason="this machine lacks the engine")]
    )
    return pytest.param(f"{arguments} quant.engine={engine}", marks=marks)


RUNS = [
    f"{CONVNET} quant=none",
    f"{CONVNET} quant=ptq",
    f"{CONVNET} quant=qat",
    f"{CONVNET} quant=dynamic",
    *(
        on(engine, f"{CONVNET} quant=ptq")
        for engine in ("fbgemm", "qnnpack", "x86", "onednn")
    ),
    *(on(engine, f"{CONVNET} quant=qat") for engine in ("qnnpack", "onednn")),
    *(on(engine, f"{MLP} quant=dynamic") for engine in ("fbgemm", "qnnpack")),
    f"{MLP} quant=ptq quant.layers.linear2=float quant.layers.linear1.bits=4",
    f"{CONVNET} quant=ptq quant.weight.granularity=per_tensor quant.weight.bits=4",
    f"{CONVNET} quant=ptq quant.activation.bits=4",
    f"{MLP} quant=qat quant.activation.bits=4 quant.weight.granularity=per_tensor",
    f"{CONVNET} quant=absmax",
    f"{MLP} quant=zeropoint quant.scope=linear",
    f"{CONVNET} quant=fp16",
    f"{CONVNET} quant=bf16",
    f"{CONVNET} quant=fp16 quant.layers.conv1=float",
    (
        f"{MLP} quant=dynamic quant.layers.linear1=fp16 quant.layers.linear2=llm_int8 "
        "quant.layers.linear3.bits=4"
    ),
    f"{CONVNET} quant=llm_int8",
    f"{CONVNET} quant=llm_int8 quant.layers.linear1.bits=4 quant.layers.linear2=fp16",
    f"{CONVNET} quant=weight_only",
    (
        f"{MLP} quant=weight_only quant.weight.bits=4 quant.weight.symmetric=false "
        "quant.layers.linear2=float"
    ),
    (
        f"{MLP} quant=weight_only quant.weight.bits=2 quant.weight.granularity=per_group "
        "quant.weight.group_size=4"
    ),
]


@pytest.mark.parametrize("arguments", RUNS)
def test_predictions_are_bit_identical(runs, images, arguments):
    folder, saved = runs(arguments)
    loaded = qtrain.load(str(folder))
    assert not loaded.training
    assert torch.equal(loaded(images), saved(images))
    assert loaded(images).std() > 0
    kinds = [
        [type(module).__name__ for module in model.modules()]
        for model in (loaded, saved)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("arguments", RUNS[:4])
def test_predictions_are_those_that_were_scored(runs, arguments):
    folder, _ = runs(arguments)
    model = qtrain.load(folder)
    scores = torch.from_numpy(np.load(folder / "examples.npz")["quantized"])
    test = build.build(build.compose(*SMALL)).data.test
    right = torch.cat([model(images).argmax(1) == labels for images, labels in test])
    assert torch.equal(right, scores.bool())
    assert 0 < scores.sum() < len(scores)


@pytest.mark.parametrize(
    "arguments, other",
    [
        ("quant=ptq quant.activation.bits=4 quant.engine=x86", "qnnpack"),
        pytest.param("quant=ptq quant.engine=x86", "qnnpack"),
        pytest.param("quant=dynamic quant.engine=qnnpack", "fbgemm"),
        pytest.param("quant=ptq", "qnnpack"),
        pytest.param("quant=ptq quant.activation.bits=4", "qnnpack"),
        pytest.param("quant=dynamic", "qnnpack"),
    ],
)
def test_the_engine_is_the_runs_not_the_readers(runs, images, arguments, other):
    if (
        not {"x86", "qnnpack", "fbgemm"} <= set(ENGINES)
        or torch.backends.quantized.engine == other
    ):
        pytest.skip("needs another engine than this machine's own")
    folder, saved = runs(f"{CONVNET} {arguments}")
    expected, before = saved(images), torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = other
        assert torch.equal(qtrain.load(folder)(images), expected)
        assert torch.backends.quantized.engine == other
    finally:
        torch.backends.quantized.engine = before


def test_loading_draws_no_random_number(runs):
    folder, _ = runs(RUNS[1])
    state = torch.get_rng_state()
    qtrain.load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_alone_are_read(runs, monkeypatch):
    folder, _ = runs(RUNS[1])
    load, modes = torch.load, []
    monkeypatch.setattr(
        torch,
        "load",
        lambda *a, **options: (
            modes.append(options.get("weights_only")) or load(*a, **options)
        ),
    )
    qtrain.load(folder)
    assert modes == [True]


def test_loaded_models_are_independent(runs, images):
    folder, _ = runs(RUNS[0])
    first, second = qtrain.load(folder), qtrain.load(folder)
    nn.init.zeros_(first.linear2.weight)
    assert second(images).std() > 0


# ---- folders that hold no model ------------------------------------------------------------------


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a finished run's folder, to be damaged."""
    folder, _ = runs(RUNS[1])
    for name in ("report.json", "quantized.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="report.json: not readable"):
        qtrain.load(tmp_path / "nowhere")


def test_a_run_that_failed(tmp_path):
    with pytest.raises(build.ConfigError):
        pipeline.execute(build.compose(*SMALL, "optimizer.lr=-1"), tmp_path, [])
    with pytest.raises(
        ValueError,
        match=r"this run failed \(ConfigError: optimizer.lr=-1.*so there is no model to load",
    ):
        qtrain.load(tmp_path)


def test_weights_that_are_missing(copy):
    (copy / "quantized.pt").unlink()
    with pytest.raises(ValueError, match="quantized.pt: there is no such file"):
        qtrain.load(copy)


def test_weights_that_are_damaged(copy):
    content = (copy / "quantized.pt").read_bytes()
    (copy / "quantized.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="quantized.pt: not a readable state dict"):
        qtrain.load(copy)


def test_weights_of_another_run(copy, runs):
    other, _ = runs(
        f"{MLP} quant=ptq quant.layers.linear2=float quant.layers.linear1.bits=4"
    )
    (copy / "quantized.pt").write_bytes((other / "quantized.pt").read_bytes())
    with pytest.raises(ValueError, match="quantized.pt: does not fit the model"):
        qtrain.load(copy)
