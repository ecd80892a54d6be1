import copy
import io
from functools import partial

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import nn

from qtrain.backend import integers, torch_ao
from qtrain.backend.packed.compact import CompactLinear
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate.points import output_points, weight_points

# What a script by hand prints; qtrain's own code must be silent, and warnings elsewhere are errors.
OLD_TORCH_STYLE = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
)


def decibels(exact, approximation):
    return 20 * torch.log10(exact.norm() / (exact - approximation).norm()).item()


def calibrated(quantizer, model, *batches):
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [(batch,) for batch in batches])
    return prepared


def quantized_layers(model):
    return {
        n: m
        for n, m in model.named_modules()
        if integers.quantized_weight(m) is not None
    }


# ---- against a plain script ----------------------------------------------------------------------


def by_hand(model, qconfig, batches, engine):
    """Prepares, calibrates and converts as torch's tutorial does."""
    model = copy.deepcopy(model).eval()
    with torch_ao.use_engine(engine):
        if hasattr(model, "conv1"):
            runs = [
                ["conv1", "bn1", "relu1"],
                ["conv2", "bn2", "relu2"],
                ["linear1", "relu3"],
            ]
        else:
            runs = [["linear1", "relu1"], ["linear2", "relu2"]]
        tq.fuse_modules(model, runs, inplace=True)
        model.qconfig = qconfig
        tq.prepare(model, inplace=True)
        for first, *_ in runs:  # torch shows them every batch twice
            model.get_submodule(first)._forward_hooks.clear()
        for batch in batches:
            model(batch)
        return tq.convert(model, inplace=True)


def assert_identical(ours, theirs, images, engine):
    layers = quantized_layers(ours)
    assert set(layers) == set(quantized_layers(theirs)) and len(layers) >= 3
    for name, module in layers.items():
        other = theirs.get_submodule(name)
        weight, reference = module.weight(), other.weight()
        assert torch.equal(weight.int_repr(), reference.int_repr())
        assert torch.equal(weight.dequantize(), reference.dequantize())
        assert torch.equal(module.bias(), other.bias())
        assert (module.scale, module.zero_point) == (other.scale, other.zero_point)
    assert torch.equal(ours.quant.scale, theirs.quant.scale)
    assert torch.equal(ours.quant.zero_point, theirs.quant.zero_point)
    with torch_ao.use_engine(engine):
        expected = theirs(images)
    assert torch.equal(ours(images), expected)


@OLD_TORCH_STYLE
def test_defaults_give_what_torchs_default_qconfig_gives(
    engine, model, images, make_ptq
):
    if engine == "onednn" and not torch.cpu._is_vnni_supported():
        pytest.skip("qtrain leaves out the bit that would saturate here")
    quantizer = make_ptq(
        engine, activation={"observer": partial(torch_ao.histogram, bins=2048)}
    )
    batches = images.split(8)
    ours = quantizer.convert(calibrated(quantizer, model, *batches))
    theirs = by_hand(model, tq.get_default_qconfig(engine), batches, engine)
    assert_identical(ours, theirs, images, engine)


TORCHS_OBSERVERS = {
    "minmax": (torch_ao.minmax, tq.MinMaxObserver, {}),
    "moving_average": (
        partial(torch_ao.moving_average, averaging_constant=0.3),
        tq.MovingAverageMinMaxObserver,
        {"averaging_constant": 0.3},
    ),
    "histogram": (
        partial(torch_ao.histogram, bins=128),
        tq.HistogramObserver,
        {"bins": 128},
    ),
}


@OLD_TORCH_STYLE
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("observer", TORCHS_OBSERVERS)
def test_settings_give_what_torchs_own_observers_give(
    observer, granularity, engine, convnet, images, make_ptq
):
    ours, theirs, arguments = TORCHS_OBSERVERS[observer]
    spec = {"bits": 7, "symmetric": True, "reduce_range": False, "observer": ours}
    quantizer = make_ptq(
        engine, weight={"bits": 6, "granularity": granularity}, activation=spec
    )
    weight_observer = (
        tq.PerChannelMinMaxObserver
        if granularity == "per_channel"
        else tq.MinMaxObserver
    )
    qconfig = tq.QConfig(
        activation=theirs.with_args(
            dtype=torch.quint8,
            qscheme=torch.per_tensor_symmetric,
            quant_min=0,
            quant_max=127,
            **arguments,
        ),
        weight=weight_observer.with_args(
            dtype=torch.qint8,
            qscheme=getattr(torch, f"{granularity}_symmetric"),
            quant_min=-32,
            quant_max=31,
        ),
    )
    batches = images.split(8)
    converted = quantizer.convert(calibrated(quantizer, convnet, *batches))
    assert_identical(
        converted, by_hand(convnet, qconfig, batches, engine), images, engine
    )


def test_percentile_equals_minmax_at_100_percent(convnet, images, make_ptq):
    outputs = []
    for observer in (
        torch_ao.minmax,
        partial(PercentileObserver, percentile=100, bins=64),
    ):
        quantizer = make_ptq(activation={"observer": observer})
        outputs.append(
            quantizer.convert(calibrated(quantizer, convnet, *images.split(8)))(
                images
            )
        )
    assert torch.equal(*outputs)


def test_an_outlier_costs_minmax_more_than_percentile(mlp, images, make_ptq):
    spoilt = images.clone()
    spoilt[0, 0, 0, 0] = 100
    ratios = []
    for observer in (
        torch_ao.minmax,
        partial(PercentileObserver, percentile=99.9, bins=8192),
    ):
        quantizer = make_ptq(activation={"observer": observer})
        quantized = quantizer.convert(calibrated(quantizer, mlp, spoilt))
        ratios.append(decibels(mlp(images), quantized(images)))
    assert ratios[1] > ratios[0] + 10


# ---- calibration ---------------------------------------------------------------------------------


def test_calibration_sees_every_batch_and_nothing_else(convnet, images, make_ptq):
    quantizer = make_ptq()
    prepared = quantizer.prepare(convnet)
    prepared(images * 50)  # not calibration: nothing observes
    quantizer.calibrate(prepared.train(), ((batch,) for batch in images.split(5)))
    prepared(images * 50)
    points = output_points(prepared.model)
    assert points["quant"].observed_range() == (
        images.min().item(),
        images.max().item(),
    )
    logits = convnet(images)
    torch.testing.assert_close(
        torch.tensor(points["linear2"].observed_range()),
        torch.stack([logits.min(), logits.max()]).detach(),
    )
    assert not prepared.training
    assert torch.equal(quantizer.reference(prepared)(images), prepared(images))


def test_calibration_scales_and_zero_points_by_formula(mlp, images, make_ptq):
    quantizer = make_ptq("qnnpack")
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    low, high = images.min().item(), images.max().item()
    assert quantized.quant.scale.item() == pytest.approx((high - low) / 255)
    assert quantized.quant.zero_point.item() == round(-low / ((high - low) / 255))
    hidden = torch.relu(mlp.linear1(images.flatten(1)))
    assert quantized.linear1.scale == pytest.approx(hidden.max().item() / 255)
    assert quantized.linear1.zero_point == 0
    weight = mlp.linear3.weight
    assert quantized.linear3.weight().q_scale() == pytest.approx(
        2 * weight.abs().max().item() / 255
    )


def test_reduce_range_halves_the_integers_of_activations(mlp, images, make_ptq):
    scales = []
    for reduce_range in (False, True):
        quantizer = make_ptq(activation={"reduce_range": reduce_range})
        scales.append(
            quantizer.convert(calibrated(quantizer, mlp, images)).quant.scale.item()
        )
    assert scales[1] / scales[0] == pytest.approx(255 / 127)


def test_reference_is_the_float_model(model, images, make_ptq):
    quantizer = make_ptq()
    reference = quantizer.reference(calibrated(quantizer, model, images))
    torch.testing.assert_close(reference(images), model(images), atol=1e-5, rtol=1e-4)


# ---- the simulation ------------------------------------------------------------------------------


def test_simulation_agrees_with_the_converted_model(engine, model, images, make_ptq):
    quantizer = make_ptq(engine)
    prepared = calibrated(quantizer, model, images)
    quantized = quantizer.convert(prepared)
    last = list(quantized_layers(quantized).values())[-1]
    steps = (quantizer.fake(prepared)(images) - quantized(images)) / last.scale
    assert steps.square().mean().sqrt() < 1


@pytest.mark.parametrize(
    "bits, ties", [(2, 0.5), (4, 0.5), (7, 0.1), (8, 0.1)], ids=["2", "4", "7", "8"]
)
def test_each_layers_simulation_rounds_as_its_kernel_does(
    bits, ties, engine, model, images, make_ptq, full_range_bits
):
    """Both come to the same for equal integers but where halfway: often, with few weights."""
    reduce_range = bits > full_range_bits(engine)
    quantizer = make_ptq(
        engine, weight={"bits": bits}, activation={"reduce_range": reduce_range}
    )
    prepared = calibrated(quantizer, model, images)
    fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
    seen = {}
    for name in quantized_layers(quantized):
        fake.get_submodule(name).register_forward_hook(
            lambda _m, args, output, name=name: seen.update({name: (args[0], output)})
        )
    fake(images)
    source = quantized.quant  # what put out the integers that a layer gets
    for name, layer in quantized_layers(quantized).items():
        x, expected = seen[name]
        with torch_ao.use_engine(engine):
            output = layer(
                torch.quantize_per_tensor(
                    x, float(source.scale), int(source.zero_point), torch.quint8
                )
            )
        top = (
            quantizer.activation.quant_range(signed=False)[1] - layer.zero_point
        ) * layer.scale
        steps = (
            output.dequantize().clamp(max=top) - expected
        ) / layer.scale  # kernels clip at 255, reduced or not
        assert steps.square().mean().sqrt() < ties and steps.abs().max() < 1.01
        source = layer


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(
    "symmetric, fused",
    [(True, False), (False, False), (True, True), (False, True)],
    ids=["symmetric", "asymmetric", "symmetric_fused", "asymmetric_fused"],
)
def test_simulated_weights_are_the_converted_ones(
    symmetric, fused, granularity, between, make_ptq
):
    model = between(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        fuse=[(0, 1)] if fused else [],
    )
    for bits in range(2, 9):
        weight = {"bits": bits, "symmetric": symmetric, "granularity": granularity}
        quantizer = make_ptq("fbgemm", weight=weight)
        prepared = calibrated(quantizer, model, torch.randn(4, 3, 4, 4))
        fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
        for name, layer in quantized_layers(quantized).items():
            site = fake.get_submodule(name)
            assert torch.equal(
                site.weight_q(site.folded()[0]), layer.weight().dequantize()
            )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_n_bits_have_2_to_the_n_integers(
    bits, granularity, symmetric, convnet, images, make_ptq
):
    weight = {"bits": bits, "granularity": granularity, "symmetric": symmetric}
    quantizer = make_ptq("fbgemm", weight=weight)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    for module in quantized_layers(quantized).values():
        integers = module.weight().int_repr()
        assert (
            -(2 ** (bits - 1)) <= integers.min()
            and integers.max() <= 2 ** (bits - 1) - 1
        )
    # 1568 weights fill all of 256 integers but a few
    assert len(quantized.linear1.weight().int_repr().unique()) > 0.9 * 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_activations_of_n_bits_have_2_to_the_n_values_and_are_a_simulation(
    bits, engine, convnet, make_ptq
):
    ramp = torch.linspace(-1, 2, 32 * 784).reshape(32, 1, 28, 28)
    quantizer = make_ptq(engine, activation={"bits": bits})
    assert quantizer.simulated is (bits < 8)
    prepared = calibrated(quantizer, convnet, ramp)
    values = {}
    for name in ("quant", "conv1"):
        layer = quantizer.fake(prepared).get_submodule(name)
        layer.register_forward_hook(
            lambda _m, _i, output, name=name: values.update({name: output.unique()})
        )
        layer(ramp)
    levels = 2 ** (bits - (bits == 8 and quantizer.activation.reduce_range))
    assert len(values["quant"]) == levels and len(values["conv1"]) <= levels


# ---- settings and files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, reason",
    [
        (
            "int4",
            r"layers\.conv\*=int4: must be float, fp16, weight_only, llm_int8, nf4, fp4, "
            r"or a mapping such as {bits: 4}",
        ),
        (None, r"layers\.conv\*=None: must be float"),
        ({"bits": 9}, r"layers\.conv\*\.bits=9: must be a whole number from 2 to 8"),
        ({"bit": 4}, r"layers\.conv\*\.bit=4: .* bits, granularity"),
        (
            {"symmetric": False},
            r"layers\.conv\*\.weight\.symmetric=false: engine onednn",
        ),
        ({"reduce_range": True}, r"layers\.conv\*\.weight\.reduce_range=true"),
    ],
    ids=str,
)
def test_mistakes_in_layers_are_told_with_their_pattern(setting, reason, make_ptq):
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs the engine with the narrowest rules")
    with pytest.raises(ValueError, match=reason):
        make_ptq("onednn", layers={"conv*": setting})


FORMATS = {"linear1": "llm_int8", "linear2": {"method": "weight_only", "bits": 4}}


@pytest.mark.parametrize("kind", ["ptq", "qat"])
def test_single_layers_by_another_method(kind, mlp, images, make_ptq, make_qat):
    quantizer = (make_ptq if kind == "ptq" else make_qat)(layers=FORMATS)
    prepared = quantizer.prepare(mlp)
    with torch.no_grad():
        for parameter in prepared.parameters():
            # As training would: what counts is the weight at conversion
            parameter.mul_(1.1)
    quantizer.calibrate(prepared, [(images,)])
    before = prepared(images)
    quantized, fake = quantizer.convert(prepared), quantizer.fake(prepared)
    for model in (quantized, fake):
        kinds = {
            type(m): m
            for m in model.modules()
            if isinstance(m, LLMInt8Linear | CompactLinear)
        }
        assert len(kinds) == 2 and kinds[CompactLinear].weight.bits == 4
        torch.testing.assert_close(
            kinds[LLMInt8Linear].weight.dequantize(),
            1.1 * mlp.linear1.weight,
            atol=0.01,
            rtol=0.01,
        )
    assert isinstance(quantized.linear3, nnq.Linear)
    assert (
        decibels(fake(images), quantized(images)) > 30
        and decibels(scaled(mlp, 1.1)(images), quantized(images)) > 10
    )
    assert torch.equal(prepared(images), before)  # both were made of copies
    assert not any(
        isinstance(m, LLMInt8Linear | CompactLinear)
        for m in quantizer.reference(prepared).modules()
    )


def scaled(model, factor):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def test_other_methods_are_for_linear_layers(convnet, make_ptq):
    with pytest.raises(
        ValueError, match=r"quant\.layers\.conv1: has no Linear layer"
    ):
        make_ptq(layers={"conv1": "fp16"}).prepare(convnet)
    with pytest.raises(ValueError, match=r"quant\.layers\.nothing: matches no layer"):
        make_ptq(layers={"nothing": "fp16"}).prepare(convnet)


def test_a_later_pattern_takes_back_another_method(mlp, make_ptq, images):
    layers = {"linear*": "fp16", "linear2": "float", "linear3": {"bits": 4}}
    quantizer = make_ptq(layers=layers)
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    assert sum(isinstance(m, CompactLinear) for m in quantized.modules()) == 1
    assert quantized.linear3.weight().int_repr().unique().numel() <= 16


def test_observers_of_one_range_serve_weights_where_they_can_forget(
    convnet, images, make_ptq
):
    percentile = partial(PercentileObserver, percentile=99.99, bins=8192)
    quantizer = make_ptq(weight={"granularity": "per_tensor", "observer": percentile})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    assert decibels(convnet(images), quantized(images)) > 20
    with pytest.raises(
        ValueError, match="weight.observer=histogram: cannot forget .*use minmax"
    ):
        make_ptq(
            weight={
                "granularity": "per_tensor",
                "observer": partial(torch_ao.histogram, bins=64),
            }
        )


def test_a_state_dict_fills_an_uncalibrated_conversion_exactly(
    engine, model, images, make_ptq
):
    quantizer = make_ptq(engine)
    quantized = quantizer.convert(calibrated(quantizer, model, images))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    nn.init.zeros_(model.linear1.weight)
    fresh = quantizer.convert(quantizer.prepare(model))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(images), quantized(images))


def test_a_calibrated_model_converts_the_same_after_saving_and_loading(
    model, images, make_ptq
):
    quantizer = make_ptq()
    prepared = calibrated(quantizer, model, images)
    loaded = quantizer.prepare(model)
    loaded.load_state_dict(prepared.state_dict())
    assert torch.equal(
        quantizer.convert(loaded)(images), quantizer.convert(prepared)(images)
    )


def test_settled_specs_are_those_of_the_engine(engine, make_ptq):
    quantizer = make_ptq(engine)
    rules = torch_ao.ENGINES[engine]
    assert (quantizer.engine, quantizer.simulated, quantizer.trains) == (
        engine,
        False,
        False,
    )
    assert (quantizer.weight, quantizer.activation) == rules.settle(
        quantizer.weight, quantizer.activation
    )
    reduced = rules.reduce_range
    reduced = reduced() if callable(reduced) else reduced
    assert quantizer.activation.reduce_range is reduced


def test_the_kernel_of_fake_quantization_can_be_chosen(convnet, make_ptq, make_qat):
    for make in (make_ptq, make_qat):
        for kernel in ("qtrain", "torch"):
            model = make(fake_quantize=kernel).prepare(convnet).model
            points = [*weight_points(model).values(), *output_points(model).values()]
            assert len(points) == 9 and {point.kernel for point in points} == {kernel}
        with pytest.raises(
            ValueError, match="fake_quantize=cuda: allowed are qtrain and torch"
        ):
            make(fake_quantize="cuda")
