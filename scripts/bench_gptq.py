"""Time and memory of GPTQ on all Linear layers of GPT-2 124M.

    python scripts/bench_gptq.py [--threads N] [--layers N] [--samples N] [--method NAME]

Random weights and tokens, windows of 512 tokens; groups of 128, as in quant=gptq.
The last line is JSON.
"""

import argparse
import json
import logging
import time

import torch
from hydra.utils import instantiate

from qtrain.analyze.measure import (
    peak_memory_bytes,
    reset_peak_memory,
    tune_malloc,
)
from qtrain.config.build import compose
from qtrain.model.gpt2 import GPT2

CONTEXT, AT_ONCE = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--method", default="gptq", help="gptq, awq or quarot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as every run does
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    model = GPT2(n_layer=args.layers).eval()
    tokens = torch.randint(model.vocab_size, (args.samples, CONTEXT))
    settings = [f"quant={args.method}", f"quant.samples={args.samples}"]
    quantizer = instantiate(compose(*settings).quant, _convert_="all")
    reset_peak_memory()
    start, busy = time.perf_counter(), time.process_time()
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(part,) for part in tokens.split(AT_ONCE)])
    found = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_gb": peak_memory_bytes("cpu") / 1e9,
    }
    print(json.dumps(vars(args) | found))


if __name__ == "__main__":
    main()
