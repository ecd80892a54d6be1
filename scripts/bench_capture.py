"""Captures torchvision's families as they are, quantizes them, and lays other libraries beside it.

    python scripts/bench_capture.py                      # all families, engine x86
    python scripts/bench_capture.py resnet18 vit_b_16 --engines x86 qnnpack --size 224 --peers

The networks are untrained: their batch-norms have taken statistics of random images, and a head of
zeros is filled. So the decibels of the logits say that nothing is broken, and nothing of accuracy.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from capture_peers import PEERS, Peer, all_products, fx, int8_products
from torch import Tensor, nn

import qtrain
from qtrain.quant.ptq import PTQ

FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_16 lraspp_mobilenet_v3_large"
).split()
Job = Peer  # a model, and how many of its multiply-accumulates are in int8
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 224}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=FAMILIES)
    parser.add_argument("--engines", nargs="+", default=["x86"])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of networks and images")
    parser.add_argument("--peers", action="store_true", help="other libraries too")
    parser.add_argument("--qat", action="store_true", help="one step of QAT too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{'model':<26}{'how':<10}{'MACs int8':>10}{'SQNR dB':>9}{'seconds':>9}")
    peers = {"fx x86": fx} | installed() if chosen.peers else {}
    for name in chosen.models:
        model, images = made(name, chosen.size, chosen.batch, chosen.seed)
        jobs: dict[str, Job] = {
            engine: partial(ours, engine=engine) for engine in chosen.engines
        }
        jobs |= peers
        jobs |= {"qat x86": trained} if chosen.qat else {}
        total = all_products(model, images)
        for how, job in jobs.items():
            show(name, how, job, model, images, total)


def installed() -> dict[str, Job]:
    """Returns the peers that are here, and says which are not."""
    there = {name: peer for name, peer in PEERS.items() if find_spec(name)}
    for name in PEERS.keys() - there.keys():
        print(f"  {name} is not installed, and left out")
    return there


def show(
    name: str, how: str, job: Job, model: nn.Module, images: Tensor, total: int
) -> None:
    """Prints one row; `total` is the number of all multiply-accumulates of layers."""
    start = time.perf_counter()
    try:
        quantized, inside = job(model, images)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            exact, real = logits(model(images)), logits(quantized(images))
    except Exception as err:  # a row of the table
        reason = " ".join(str(err).split())[:150]
        print(f"{name:<26}{how:<10}{type(err).__name__}: {reason}", flush=True)
        return
    decibels = 10 * torch.log10(exact.square().sum() / (exact - real).square().sum())
    share = 100 * inside / total
    print(
        f"{name:<26}{how:<10}{share:>9.1f}%{decibels:>9.1f}{seconds:>9.1f}",
        flush=True,
    )


@torch.no_grad()
def made(name: str, size: int, batch: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Returns an untrained network, in eval mode, and images of its size."""
    torch.manual_seed(seed)
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


def ours(model: nn.Module, images: Tensor, engine: str) -> tuple[nn.Module, int]:
    """Returns the int8 model, captured and proved; without the gate on its layers."""
    quantizer = PTQ(engine=engine)
    simulation = quantizer.prepare(model, (images,))
    quantizer.calibrate(simulation, [(images,)])
    print(
        f"  {simulation.capture['sites']} sites, leaves {simulation.capture['leaves']}"
    )
    converted = quantizer.convert(simulation)
    return converted, int8_products(converted, images)


def trained(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """Returns the int8 model after one step of QAT."""
    simulation = qtrain.prepare(model, [images], engine="x86")
    loss = logits(simulation(images)).square().mean()
    loss.backward()
    torch.optim.SGD(simulation.parameters(), 1e-6).step()
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}")
    converted = qtrain.convert(simulation)
    return converted, int8_products(converted, images)


def logits(output: Any) -> Tensor:
    """Returns the tensor of an output that may be a mapping or a tuple."""
    if isinstance(output, dict):
        return output["out"]
    return getattr(output, "logits", output)


if __name__ == "__main__":
    main()
