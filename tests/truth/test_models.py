"""Sound models run; what cannot be right is refused before training, with a remedy that works."""

import pytest
import torch

import qtrain

BOTH = pytest.mark.parametrize("quant", ["ptq", "qat"])


def agrees(run):
    assert run.code == 0, run.text
    assert abs(run.loss("quantized") - run.loss("fake")) <= 0.02 * run.loss("fake")
    return True


def refused(run, *words):
    assert "epoch 1/" not in run.text, "refused after training"
    return refused_late(run, *words)


def refused_late(run, *words):
    assert run.code == 1 and "Traceback" not in run.text, run.text
    assert [word for word in words if word not in run.text] == [], run.text
    return True


@BOTH
@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "hardswish", "leaky", "elu", "functional"]
)
def test_in_place_activations_are_sound(job, activation, quant):
    assert agrees(job("nets.InPlace", f"quant={quant}", activation=activation))


@pytest.mark.parametrize(
    "engine", [e for e in torch.backends.quantized.supported_engines if e != "none"]
)
def test_prelu_is_sound_on_every_engine(job, engine):
    assert agrees(job("nets.InPlace", f"quant.engine={engine}", activation="prelu"))


@BOTH
def test_a_forward_that_changes_its_input_is_sound(job, quant):
    assert agrees(job("nets.ChangesItsInput", f"quant={quant}"))


@BOTH
@pytest.mark.parametrize("kind", ["relu", "pool", "dropout"])
def test_one_object_without_weights_in_two_places_is_sound(job, kind, quant):
    assert agrees(job("shared_nets.Shared", f"quant={quant}", kind=kind))


@BOTH
def test_a_kept_activation_is_sound(job, quant):
    assert agrees(job("nets.KeepsActivation", f"quant={quant}"))


@BOTH
@pytest.mark.parametrize("kind", ["plain", "relu6", "not_affine"])
def test_fusions_that_torch_lacks_are_left_apart(job, kind, quant):
    assert agrees(
        job(
            "fused_nets.Fused",
            f"quant={quant}",
            kind=kind,
            groups=[["conv", "bn", "relu"]],
        )
    )


@BOTH
def test_linear_batch_norm_relu_fuses(job, quant):
    run = job("fused_nets.LinearBN", f"quant={quant}")
    assert agrees(run)
    assert run.report["coverage"]["macs_quantized"] == 1


def test_fuse_model_as_most_have_it_needs_no_argument(job):
    groups = [["conv", "bn", "relu"]]
    assert agrees(job("fused_nets.FusedAsTorchDoes", groups=groups))
    assert refused(
        job("fused_nets.FusedAsTorchDoes", "quant=qat", groups=groups),
        "fuse_model",
        "is_qat=is_qat",
    )


def test_what_fuse_model_raises_names_it(job):
    groups = [["conv", "bn", "relu"]]
    assert refused(
        job("fused_nets.FusedForEvaluation", "quant=qat", groups=groups),
        "fuse_model",
        "fuses for evaluation",
    )
    assert refused(
        job("fused_nets.Fused", groups=[["conv1", "bn"]]),
        "fuse_model",
        "conv1 is no module of Fused",
    )
    assert refused(
        job("fused_nets.Fused", groups=groups, kind="no_statistics"),
        "bn (BatchNorm2d)",
        "track_running_stats",
    )


def test_unfused_batch_norms_are_noted(job):
    run = job("fused_nets.Fused", groups=[])
    assert agrees(run)
    assert "conv + bn" in run.text


@pytest.mark.parametrize("quant", ["ptq", "qat", "none", "dynamic"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_computed_by_hooks_are_refused_by_name(job, norm, quant):
    assert refused(
        job("nets.WeightNormed", f"quant={quant}", norm=norm),
        "layer fc",
        norm,
        "parametrizations",
    )


@pytest.mark.parametrize("norm", ["new_weight_norm", "new_spectral_norm"])
def test_the_advised_parametrization_works_and_qat_refuses_it(job, norm):
    assert agrees(job("nets.WeightNormed", "quant=ptq", norm=norm))
    assert refused(
        job("nets.WeightNormed", "quant=qat", norm=norm),
        "fc",
        "remove_parametrizations",
    )


def test_an_instance_norm_with_running_statistics_is_refused_and_its_remedy_works(
    job,
):
    assert refused(
        job("nets.Normed", norm="instance", running=True),
        "layer norm",
        "running statistics",
    )
    run = job(
        "nets.Normed", "+quant.layers.norm=float", norm="instance", running=True
    )
    assert agrees(run)


@BOTH
def test_a_model_without_stubs_taken_as_it_is_hears_of_them_in_one_line(job, quant):
    assert agrees(job("nets.NoStub", f"quant={quant}"))
    run = job("nets.NoStub", f"quant={quant}", "quant.capture.mode=as_is")
    assert refused(run, "layer head (Linear)", "QuantStub")
    assert max(map(len, run.text.splitlines())) < 700


def test_a_parameter_that_meets_int8_hears_of_its_stub_and_the_remedy_works(job):
    assert refused(
        job("nets.Parameters"), "nn.Parameter", "QuantStub of its own", "nets.py:"
    )
    assert agrees(job("nets.Parameters", stub=True))


def test_a_layer_without_weights_is_refused_by_name_and_the_remedy_works(job):
    assert refused(
        job("nets.Lazy"), "layer fc has no weights", "run the model on a sample"
    )
    assert agrees(job("nets.Lazy", shown=True))


def test_all_calls_without_kernel_are_named_at_once(job):
    assert refused(
        job("nets.Several"), "aten::silu", "aten::add", "aten::softplus", "nets.py:"
    )


def test_an_embeddings_own_qconfig_is_refused_by_name(job):
    assert refused(
        job("nets.Tokens", qconfig=True),
        "layer emb (Embedding)",
        "qconfig of its own",
    )


@pytest.mark.parametrize("bag", [True, False], ids=["bag", "embedding"])
def test_embeddings_are_kept_float(job, bag):
    run = job("nets.Tokens", "+quant.layers.emb=float", bag=bag)
    assert agrees(run)
    assert "emb" in run.report["coverage"]["float_layers"]


def test_a_plain_recurrent_layer_is_refused_and_its_remedy_is_named(job):
    run = job("nets.Recurrent", kind="RNN")
    assert refused(run, "layer cell (RNN)", "{cell: float}")


@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_a_recurrent_layer_between_stubs_is_int8(job, quant):
    run = job("nets.Recurrent", f"quant={quant}")
    assert run.code == 0, run.text
    assert run.report["plan"]["cell"]["backend"] == "dynamic"
    assert run.report["coverage"]["macs_quantized"] == 1


def test_layers_go_by_the_users_names(job):
    """Not by those of the parts that fusing makes, whose advice quant.layers would not take."""
    run = job(
        "fused_nets.Fused",
        "data._target_=datasets.huge_calibration",
        groups=[["conv", "relu"]],
        kind="straight",
    )
    assert refused_late(
        run, "layer conv: its output is not finite in calibration, batch 1"
    )
    run = job("nets.Volume", "+quant.layers.nope=float")
    assert refused(run, "quant.layers.nope: matches no layer", "layers.0", "layers.2")


@pytest.mark.parametrize(
    "kind, reason", [("Conv3d", "cannot be saved"), ("MaxPool3d", "cannot run")]
)
def test_layers_that_an_engine_cannot_run_or_save_are_refused_and_their_remedy_works(
    job, kind, reason
):
    run = job("nets.Volume", "quant.engine=qnnpack", kind=kind)
    assert refused(
        run, f"layer layers.0 ({kind}) {reason}", "{layers.0: float}", "qnnpack"
    )
    assert agrees(
        job(
            "nets.Volume",
            "quant.engine=qnnpack",
            "quant.layers={layers.0: float}",
            kind=kind,
        )
    )
    assert agrees(job("nets.Volume", "quant.engine=fbgemm", kind=kind))


def test_a_wildcard_does_not_match_stubs(job):
    run = job("nets.InPlace", 'quant.layers={"*": float}')
    assert agrees(run)
    assert refused(
        job("nets.InPlace", "+quant.layers.quant=float"), "quant.layers.quant", "stub"
    )


def test_auxiliary_outputs_train_on_their_weighted_losses(job):
    for quant in ("ptq", "qat"):
        assert agrees(job("nets.Output", f"quant={quant}", kind="aux"))


@pytest.mark.parametrize(
    "kind, word",
    [("dict", "is a dict"), ("map", "(B, C)"), ("few", "has 5 classes")],
    ids=["dict", "map", "few"],
)
def test_outputs_that_are_no_logits_are_refused_before_training(job, kind, word):
    assert refused(job("nets.Output", kind=kind), "output", word)


@pytest.mark.parametrize(
    "target, words",
    [
        ("datasets.labels_from_1", ["from 1 to 10", "0..9"]),
        ("datasets.pixels", ["labels are int64", "(B,)"]),
        ("datasets.float_labels", ["labels are float32"]),
        ("datasets.nan_images", ["test split", "NaN"]),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(job, target, words):
    assert refused(job("mlp", f"data._target_={target}"), "data", *words)


def test_a_part_of_a_fused_layer_is_refused_by_name(job):
    for quant in ("ptq", "qat"):
        run = job("convnet", f"quant={quant}", "quant.layers={conv1.0: {bits: 2}}")
        assert refused(run, "quant.layers.conv1.0", "fused layer conv1")


def test_a_failed_load_leaves_torchs_engine_as_it_was(job):
    run, other = job("mlp", "quant.engine=qnnpack"), job("mlp", "model.hidden=8")
    before = torch.backends.quantized.engine
    (run.run_dir / "quantized.pt").write_bytes(
        (other.run_dir / "quantized.pt").read_bytes()
    )
    with pytest.raises(ValueError, match="quantized.pt"):
        qtrain.load(run.run_dir)
    assert torch.backends.quantized.engine == before


def test_a_loaded_model_predicts_as_the_run_did(job):
    """Of layers that qtrain puts in the place of torch's too."""
    run = job("nets.Normed")
    model = qtrain.load(run.run_dir, trust=["nets"])
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
