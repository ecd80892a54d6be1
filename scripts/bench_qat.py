"""What QAT costs: one of its steps over a float step, of qtrain, of torch.ao and of peers.

And what calibration costs: a batch through histogram observers, over a plain forward pass.

    python scripts/bench_qat.py [--threads N] [--rounds N] [--cases "convnet, batch 64" ...]

Each candidate takes turns with the float model, a step each, and with no other, whose data it would
find in the CPU's caches; the float model's own row shows how exact that is. Figures are medians,
and ratios are medians of the ratios within a turn, which a busy machine disturbs less. Memory is
the most that a step allocates at any moment, beyond the model. The peers (extra peers: nncf,
aimet-torch, brevitas) are measured where they are installed, and take it. The last line is the same
as JSON.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization as tq
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qtrain.analyze.measure import time_interleaved, tune_malloc
from qtrain.config.build import RunParts, build, compose

IMAGES = {
    "mlp, batch 10": 10,
    "mlp, batch 128": 128,
    "convnet, batch 64": 64,
    "resnet18, batch 64": 64,
}
CASES = {
    name: [f"model={name.partition(',')[0]}", f"data.batch_size={size}"]
    for name, size in IMAGES.items()
}
FULL = "qtrain -128..127"  # its weights in torch.ao's integers
CASES["gpt2_nano, batch 32"] = [
    *(
        "model=gpt2_nano",
        "task=language_modeling",
        "data=shakespeare",
        "optimizer=adamw",
        "data.batch_size=32",
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as every run does
    figures = {}
    for name in args.cases:
        figures[name] = measure(CASES[name], args.rounds)
        figures[name]["calibration"] = measure_calibration(CASES[name], args.rounds)
    print(json.dumps({"threads": args.threads, "rounds": args.rounds, **figures}))


def measure(overrides: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Prints and returns {candidate: {"ms", "over_float", "peak_mb"}} of one training step."""
    # It announces its own deprecation
    warnings.filterwarnings("ignore", module="torch.ao")
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
    parts = build(compose("quant=qat", *overrides))
    batches = list(itertools.islice(parts.data.train, 8))
    full = build(compose("quant=qat", "quant.weight.narrow_range=false", *overrides))
    models = {
        "float": parts.model.train(),
        "qtrain": ours(parts),
        FULL: ours(full),
        "torch.ao": torch_ao(parts),
    }
    for name, make in PEERS.items():
        if importlib.util.find_spec(name):
            try:
                models[name] = make(parts, batches[0])
            except Exception as err:  # what it says to this model is its result here
                print(
                    f"  {name} does not take this model: {type(err).__name__}: "
                    f"{str(err).splitlines()[0][:80]}"
                )
    steps = {name: stepper(model, parts, batches) for name, model in models.items()}
    print(f"{' '.join(overrides)}: one training step, medians of {rounds}")
    figures = {}
    for name, step in steps.items():
        baseline, own = time_interleaved([steps["float"], step], 8, rounds)
        figures[name] = {
            "ms": round(float(own.median()), 3),
            "over_float": round(float((own / baseline).median()), 3),
            "peak_mb": round(peak_bytes(step) / 1e6, 2),
        }
        print(
            "  {:<16} {ms:8.2f} ms  {over_float:5.2f} times float  {peak_mb:8.2f} MB".format(
                name, **figures[name]
            )
        )
    return figures


def measure_calibration(
    overrides: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Prints and returns {candidate: {"ms", "over_forward"}} of one batch."""
    parts = build(compose("quant=ptq", *overrides))
    batches = [
        parts.task.inputs(batch) for batch in itertools.islice(parts.data.train, 8)
    ]
    model, turn = parts.model.eval(), itertools.cycle(batches)
    ours = parts.quantizer.prepare(model)
    torchs = tq.prepare(configured(parts, tq.get_default_qconfig, is_qat=False))
    calls = {
        "forward": lambda: model(*next(turn)),
        "qtrain": lambda: parts.quantizer.calibrate(ours, [next(turn)]),
        "torch.ao": lambda: torchs(*next(turn)),
    }
    times = time_interleaved(list(calls.values()), 8, rounds)
    print("  calibration with histograms, over a forward pass:", end="")
    figures = {}
    for name, row in zip(calls, times, strict=True):
        ratio = float((row / times[0]).median())
        figures[name] = {
            "ms": round(float(row.median()), 3),
            "over_forward": round(ratio, 3),
        }
    print(
        ", ".join(
            f" {name} {figures[name]['over_forward']:.2f}"
            for name in ("qtrain", "torch.ao")
        )
    )
    return figures


def stepper(
    model: nn.Module, parts: RunParts, batches: list[Any]
) -> Callable[[], None]:
    optimizer, turn = parts.optimizer(model.parameters()), itertools.cycle(batches)

    @torch.enable_grad()
    def step() -> None:
        batch = next(turn)
        parts.task.loss(model(*parts.task.inputs(batch)), batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """Returns the most bytes allocated at any moment of a step, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded = profiler.profiler.kineto_results.events()
    events = sorted(
        (e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    return max(itertools.accumulate(event.nbytes() for event in events))


def ours(parts: RunParts) -> nn.Module:
    prepared = parts.quantizer.prepare(parts.model)
    parts.quantizer.on_epoch(prepared.train(), 0)
    return prepared


def torch_ao(parts: RunParts) -> nn.Module:
    """torch's own recipe: default QAT qconfig, fused fake quantization, quick Conv-BN path."""
    return tq.prepare_qat(configured(parts, tq.get_default_qat_qconfig, is_qat=True))


def configured(
    parts: RunParts, qconfig: Callable[[str], Any], *, is_qat: bool
) -> Any:
    model: Any = copy.deepcopy(parts.model).train(is_qat)
    if hasattr(model, "fuse_model"):
        model.fuse_model(is_qat=is_qat)
    model.qconfig = qconfig(parts.quantizer.engine)
    for module in model.modules():  # torch would quantize embeddings, and then fail
        if isinstance(module, nn.Embedding):
            module.qconfig = None  # type: ignore[assignment]
    return model


def plain(parts: RunParts) -> nn.Module:
    """The float model as the peers want it: they know nothing of torch.ao's stubs."""
    model: Any = copy.deepcopy(parts.model).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, tq.QuantStub | tq.DeQuantStub):
            model.set_submodule(name, nn.Identity())
    return model


def nncf(parts: RunParts, batch: Any) -> nn.Module:
    import nncf

    data = nncf.Dataset([batch], lambda item: parts.task.inputs(item)[0])
    return nncf.quantize(plain(parts), data, subset_size=1).train()


def aimet(parts: RunParts, batch: Any) -> nn.Module:
    from aimet_torch.quantsim import QuantizationSimModel

    inputs = parts.task.inputs(batch)
    sim = QuantizationSimModel(
        plain(parts), dummy_input=inputs[0], default_param_bw=8
    )
    sim.compute_encodings(lambda model, _: model(*inputs), None)
    return sim.model.train()


def brevitas(parts: RunParts, batch: Any) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    model = preprocess_for_quantize(plain(parts))
    return quantize(model).train()


PEERS: dict[str, Callable[[RunParts, Any], nn.Module]] = {
    "nncf": nncf,
    "aimet_torch": aimet,
    "brevitas": brevitas,
}

if __name__ == "__main__":
    main()
