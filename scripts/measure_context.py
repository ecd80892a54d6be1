"""What quantization, and a cache of 8 bits, cost a language model that reads up to its n_positions.

    python scripts/measure_context.py RUN [--distances N...] [--needles N]

Of the float and the quantized model of a finished run, and of the latter with keys
and values in int8: perplexity on the run's test text, the loss above float's with its
standard error, KL and top-1 agreement with float, and what a needle saves, in nats a
token, by how far back it stands (see qtrain/analyze/needle.py). The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import Tensor, nn

import qtrain
from qtrain.analyze.agreement import agreement, standard_error
from qtrain.analyze.needle import LENGTH, needle_gains
from qtrain.model.kv_cache import KVCache
from qtrain.runs.report import FILE_NAME, load_report
from qtrain.train.evaluate import evaluate


class Int8Cache(nn.Module):
    """A model that reads all keys and values from 8 bits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor) -> Tensor:
        cache = KVCache(self.model, len(idx), idx.shape[1], "int8")
        logits: Tensor = self.model(idx, cache)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--distances", type=int, nargs="+", default=None)
    parser.add_argument("--needles", type=int, default=64)
    args = parser.parse_args()
    config = load_report(args.run / FILE_NAME)["config"]
    data = instantiate(config["data"] | {"device": "cpu"})
    task = instantiate(config["task"])
    exact: Any = qtrain.load_float(args.run)
    quantized = qtrain.load(args.run)
    models = {
        "float": exact,
        "quantized": quantized,
        "quantized, int8 cache": Int8Cache(quantized),
    }
    far = exact.n_positions - LENGTH
    distances = args.distances or [LENGTH, far // 2, far]
    text = data.test.tokens.long()
    sample = next(iter(data.test))[0]
    scores = {name: evaluate(m, data.test, task) for name, m in models.items()}
    rows = []
    for name, model in models.items():
        more = scores[name].losses.double() - scores["float"].losses.double()
        gains = needle_gains(
            model, text, exact.n_positions, distances, count=args.needles
        )
        rows.append(
            {
                "model": name,
                "perplexity": scores[name].metrics["perplexity"],
                "loss_difference": float(more.mean()),
                "standard_error": standard_error(more),
                **agreement(exact, model, (sample,)),
                "needle": gains,
            }
        )
    print(f"perplexity, loss above float, KL, top-1; needles {distances} back")
    for row in rows:
        saved = [
            f"{gain:.3f} +- {error:.3f}" for gain, error in row["needle"].values()
        ]
        print(
            f"{row['model']:22} {row['perplexity']:8.4f}  "
            f"{row['loss_difference']:+.5f} +- {row['standard_error']:.5f}  "
            f"{row['kl']:.5f}  {row['top1']:.4f}  {',  '.join(saved)}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
