"""Captures torchvision's families as they are, quantizes them, and lays torch's FX mode beside it.

    python scripts/bench_capture.py                      # all families, engine x86
    python scripts/bench_capture.py resnet18 vit_b_16 --engines x86 qnnpack --size 224 --peers

The networks are untrained: their batch-norms have taken statistics of random images, and a head of
zeros is filled. So the decibels of the logits say that nothing is broken, and nothing of accuracy.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qtrain
from qtrain.backend.integers import quantized_weight
from qtrain.backend.torch_ao import use_engine
from qtrain.quant.ptq import PTQ

FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_16 lraspp_mobilenet_v3_large"
).split()
Job = Callable[[nn.Module, Tensor], nn.Module]
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 224}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=FAMILIES)
    parser.add_argument("--engines", nargs="+", default=["x86"])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peers", action="store_true", help="torch's FX mode too")
    parser.add_argument("--qat", action="store_true", help="one step of QAT too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'model':<26}{'how':<10}{'MACs int8':>10}{'SQNR dB':>9}{'seconds':>9}")
    for name in chosen.models:
        model, images = made(name, chosen.size, chosen.batch)
        jobs: dict[str, Job] = {
            engine: partial(ours, engine=engine) for engine in chosen.engines
        }
        jobs |= {"fx x86": fx} if chosen.peers else {}
        jobs |= {"qat x86": trained} if chosen.qat else {}
        total = None  # ours has all products as layers
        for how, job in jobs.items():
            total = show(name, how, job, model, images, total)


def show(
    name: str, how: str, job: Job, model: nn.Module, images: Tensor, total: int | None
) -> int | None:
    """Prints one row; returns the number of all multiply-accumulates, of the first row's model."""
    start = time.perf_counter()
    try:
        quantized = job(model, images)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            exact, real = logits(model(images)), logits(quantized(images))
    except Exception as err:  # a row of the table
        reason = " ".join(str(err).split())[:150]
        print(f"{name:<26}{how:<10}{type(err).__name__}: {reason}", flush=True)
        return total
    decibels = 10 * torch.log10(exact.square().sum() / (exact - real).square().sum())
    inside, own = products(quantized, images)
    total = own if total is None else total
    share = 100 * inside / total
    print(
        f"{name:<26}{how:<10}{share:>9.1f}%{decibels:>9.1f}{seconds:>9.1f}",
        flush=True,
    )
    return total


@torch.no_grad()
def made(name: str, size: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Returns an untrained network, in eval mode, and images of its size."""
    torch.manual_seed(0)
    extra = {"weights_backbone": None} if name.startswith("lraspp") else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    size = SIZES.get(name, size)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    for _ in range(2):
        model.train()(torch.randn(batch, 3, size, size))
    return model.eval(), torch.randn(batch, 3, size, size)


def ours(model: nn.Module, images: Tensor, engine: str) -> nn.Module:
    """Returns the int8 model, captured and proved; without the gate on its layers."""
    quantizer = PTQ(engine=engine)
    simulation = quantizer.prepare(model, (images,))
    quantizer.calibrate(simulation, [(images,)])
    print(
        f"  {simulation.capture['sites']} sites, leaves {simulation.capture['leaves']}"
    )
    return quantizer.convert(simulation)


def trained(model: nn.Module, images: Tensor) -> nn.Module:
    """Returns the int8 model after one step of QAT."""
    simulation = qtrain.prepare(model, [images], engine="x86")
    logits(simulation(images)).square().mean().backward()
    torch.optim.SGD(simulation.parameters(), 1e-6).step()
    return qtrain.convert(simulation)


def fx(model: nn.Module, images: Tensor) -> nn.Module:
    """Returns what torch's FX mode makes of it."""
    with use_engine("x86"):
        mapping = get_default_qconfig_mapping("x86")
        prepared = prepare_fx(copy.deepcopy(model), mapping, (images,))
        prepared(images)
        return convert_fx(prepared)  # type: ignore[no-any-return]


def products(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Returns the multiply-accumulates with a quantized weight, and those of all layers."""
    counts = [0, 0]

    def count(layer: Any, inputs: Any, output: Any) -> None:
        weight = quantized_weight(layer)
        is_quantized = weight is not None
        weight = layer.weight if weight is None else weight
        number = output.numel() * weight.shape[1:].numel()
        counts[1] += number
        counts[0] += number if is_quantized else 0

    handles = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter)
        and layer.weight.ndim > 1
        and not isinstance(layer, nn.Embedding)
        or len(getattr(quantized_weight(layer), "shape", ())) > 1
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


def logits(output: Any) -> Tensor:
    """Returns the tensor of an output that may be a mapping or a tuple."""
    if isinstance(output, dict):
        return output["out"]
    return getattr(output, "logits", output)


if __name__ == "__main__":
    main()
