"""LLM.int8() on the CPU: ours against bitsandbytes' Linear8bitLt, threshold 6.0 (extra `peers`).

    python scripts/bench_llm_int8.py [--threads N] [--rounds N]

The four Linear layers of a block of GPT-2 124M, for 1, 16 and 128 rows of float32 input without and
with 4 outlier columns. Both take turns in one process; figures are medians in ms. bitsandbytes'
logger is silent, for it would log a warning in every call and lose time by it. The last line is the
sums over a block as JSON.
"""

import argparse
import json
import logging
import statistics
import time

import bitsandbytes
import torch
from torch import Tensor, nn

from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec

SHAPES = {
    "c_attn": (768, 2304),
    "attn.c_proj": (768, 768),
    "c_fc": (768, 3072),
    "mlp.c_proj": (3072, 768),
}
SPEC = QuantSpec(bits=8, symmetric=True, granularity="per_channel")


def medians(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Returns {model: ms of one call}."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-3, rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    layers = {}
    for name, (num_inputs, num_outputs) in SHAPES.items():
        exact = nn.Linear(num_inputs, num_outputs)
        theirs = bitsandbytes.nn.Linear8bitLt(
            num_inputs, num_outputs, has_fp16_weights=False, threshold=6.0
        )
        theirs.load_state_dict(exact.state_dict())
        ours = LLMInt8Linear(IntegerWeight(exact.weight, SPEC), exact.bias, 6.0)
        layers[name] = {"bitsandbytes": theirs.to("cpu").eval(), "qtrain": ours}
    print(
        f"{'layer':>12} {'rows':>5} {'outliers':>8} {'bitsandbytes':>13} {'qtrain':>8} {'ratio':>6}"
    )
    blocks = []
    for rows in (1, 16, 128):
        for outliers in (0, 4):
            total = {"bitsandbytes": 0.0, "qtrain": 0.0}
            for name, models in layers.items():
                x = torch.randn(rows, SHAPES[name][0]).clamp(-5, 5)
                x[:, 100 : 100 + outliers] = 40.0
                found = medians(models, x, args.rounds)
                total = {kind: total[kind] + value for kind, value in found.items()}
                show(name, rows, outliers, found)
            show("block", rows, outliers, total)
            blocks.append({"rows": rows, "outliers": outliers, **total})
    print(json.dumps({"threads": torch.get_num_threads(), "block_ms": blocks}))


def show(name: str, rows: int, outliers: int, found: dict[str, float]) -> None:
    theirs, ours = found["bitsandbytes"], found["qtrain"]
    print(
        f"{name:>12} {rows:>5} {outliers:>8} {theirs:>13.3f} {ours:>8.3f} {theirs / ours:>6.2f}"
    )


if __name__ == "__main__":
    main()
