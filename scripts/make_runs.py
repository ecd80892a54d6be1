"""Makes folders of finished runs without running anything, to try `qtrain-compare` on many.

    python scripts/make_runs.py FOLDER [--count 1000] [--models convnet mobilenet_v2]

The runs form a grid of models, methods, bits, observers, engines, learning rates and seeds; fewer
bits and cruder methods cost accuracy. One job in a hundred has failed.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.common.files import sha256
from qtrain.runs.report import EXAMPLES, Report

NUM_EXAMPLES = 10_000
FLOAT_KB = {"convnet": 833.5, "mobilenet_v2": 9_120.0}
# Share of examples newly wrong at 8 bits
COST = {
    "none": 0.0,
    "qat": 0.001,
    "ptq": 0.003,
    "dynamic": 0.001,
}
GRID = {
    "method": ("qat", "ptq"),
    "bits": (8, 6, 4),
    "observer": ("minmax", "histogram", "percentile", "moving_average"),
    "engine": ("x86", "qnnpack", "fbgemm", "onednn"),
    "lr": (0.01, 0.003, 0.001),
}


def write_run(
    folder: Path,
    *,
    scores: dict[str, np.ndarray],
    method: str = "ptq",
    bits: tuple[int | None, int | None] = (8, 8),
    engine: str | None = "x86",
    observer: str | None = "histogram",
    seed: int = 0,
    model: str = "convnet",
    data: str = "mnist",
    data_fingerprint: str | None = None,
    name: str | None = None,
    lr: float = 0.001,
    size_kb: tuple[float, float | None] = (800.0, 200.0),
    latency_ms: tuple[float, float | None] = (0.4, 0.2),
    other_load: float = 0.0,
    seconds: float = 10.0,
    simulated: bool = False,
    overrides: tuple[str, ...] = (),
    settings: dict[str, Any] | None = None,
    curves: int = 0,
) -> Path:
    """Writes one finished run; returns its folder.

    Args:
        scores: what examples.npz holds: "float", "quantized" and perhaps "fake", (N,); uint8 are
            right-or-wrong scores, floats are losses.
        size_kb, latency_ms: float and quantized.
        other_load: CPU cores that other programs used meanwhile.
        settings: more of the config, laid over its top level.
        curves: points of the training curves.
    """
    folder.mkdir(parents=True)
    np.savez(folder / EXAMPLES, **scores)
    right_or_wrong = scores["float"].dtype == np.uint8

    def metrics(kind: str) -> dict[str, Any] | None:
        if kind not in scores:
            return None
        mean = float(scores[kind].astype(float).mean())
        if not right_or_wrong:
            return {
                "perplexity": float(np.exp(mean)),
                "loss": mean,
                "count": len(scores[kind]),
            }
        confusion = [[100] * 10] * 10  # as large as a real one
        return {
            "accuracy": mean,
            "loss": 2 * (1 - mean),
            "confusion": confusion,
            "count": len(scores[kind]),
        }

    gain = scores["quantized"].astype(float) - scores["float"].astype(float)
    specs = [
        width and {"bits": width, "observer": observer, "granularity": "per_tensor"}
        for width in bits
    ]
    config = {
        "task": {"_target_": "qtrain.task.classification.Classification"},
        "data": {
            "_target_": f"qtrain.data.{data}",
            "batch_size": 64,
            "eval_batch_size": 500,
            "val_size": 1000,
        },
        "model": {"_target_": f"qtrain.model.{model}", "width": 16, "hidden": 128},
        "quant": {
            "_target_": f"qtrain.quant.{method}",
            "engine": engine,
            "layers": {},
        }
        | dict(zip(("weight", "activation"), specs, strict=True)),
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": lr},
        "trainer": {
            "epochs": 3,
            "max_steps": None,
            "accumulate": 1,
            "clip_norm": None,
            "log_every": 50,
        },
        "measure": {"batch_sizes": [1, 64], "warmup": 5, "repeats": 50},
        "name": name or f"{model}_{method}",
        "seed": seed,
        "choices": {"model": model, "data": data, "quant": method},
    }
    medians = [
        t
        and {
            size: {"median": t * int(size) ** 0.5, "p90": t * 1.2}
            for size in ("1", "64")
        }
        for t in latency_ms
    ]
    sizes = [size and round(1000 * size) for size in size_kb]
    Report(
        name=config["name"],
        seed=seed,
        config=config | (settings or {}),
        overrides=[f"quant={method}", f"seed={seed}", *overrides],
        model=model,
        data=data,
        data_fingerprint=data_fingerprint,
        quality="accuracy" if right_or_wrong else "perplexity",
        quant={
            "method": method,
            "engine": engine,
            "weight": specs[0],
            "activation": specs[1],
            "simulated": simulated,
        },
        metrics={kind: metrics(kind) for kind in ("float", "fake", "quantized")},
        difference={
            "accuracy" if right_or_wrong else "perplexity": float(gain.mean()),
            "standard_error": float(gain.std(ddof=1) / len(gain) ** 0.5),
            "gained": int((gain > 0).sum()),
            "lost": int((gain < 0).sum()),
        },
        truth={
            "sqnr_db": {"conv1": 30.0},
            "min_sqnr_db": 30.0,
            "ok": True,
            "failures": [],
        },
        qparams={f"layer{i}": {"scale": 0.01, "zero_point": 0} for i in range(20)},
        coverage={
            "params_quantized": 0.99,
            "macs_quantized": 1.0,
            "float_layers": {},
        },
        size_bytes={
            "float": sizes[0],
            "quantized": sizes[1],
            "float_file": sizes[0],
            "quantized_file": sizes[1],
        },
        latency_ms=dict(zip(("float", "quantized"), medians, strict=True)),
        other_load=other_load,
        threads=2,
        device="cpu",
        time_s={"float_training": seconds / 2, "calibration": seconds / 2},
        sha256={EXAMPLES: sha256(folder / EXAMPLES)},
    ).save(folder)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(50, 50 * curves + 1, 50):
            for stage in ("float", "qat") if method == "qat" else ("float",):
                loss = (
                    2.3 * float(np.exp(-step / 400))
                    + 0.05
                    + 0.02 * float(np.sin(step + seed))
                )
                file.write(
                    json.dumps(
                        {"step": step, f"{stage}/train_loss": loss, f"{stage}/lr": lr}
                    )
                    + "\n"
                )
                if step % 500 == 0:
                    file.write(
                        json.dumps(
                            {"step": step, f"{stage}/val_accuracy": 1 - loss / 10}
                        )
                        + "\n"
                    )
    return folder


def write_failure(
    folder: Path, error: str, method: str = "qat", seed: int = 0, **identity: str
) -> Path:
    """Writes one failed run; returns its folder."""
    folder.mkdir(parents=True)
    identity = {"model": "convnet", "data": "mnist"} | identity
    Report(
        name=folder.name,
        seed=seed,
        config={"seed": seed},
        overrides=[f"quant={method}", f"seed={seed}"],
        status="failed",
        error=error,
        quant={"method": method},
        **identity,
    ).save(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--models", nargs="+", default=["convnet"], choices=list(FLOAT_KB)
    )
    args = parser.parse_args()
    kinds = [
        {},
        *(
            dict(zip(GRID, values, strict=True))
            for values in itertools.product(*GRID.values())
        ),
    ]
    rng = np.random.default_rng(0)
    jobs = (
        (seed, model, kind)
        for seed in itertools.count()
        for model in args.models
        for kind in kinds
    )
    for number, (seed, model, kind) in enumerate(itertools.islice(jobs, args.count)):
        method = kind.get("method", "none")
        folder = args.folder / f"sweep_{seed}" / f"{number}_{model}_{method}"
        if number % 100 == 99:
            write_failure(
                folder,
                "TruthError: conv1: 3.1 dB between fake and converted",
                method,
                seed,
                model=model,
            )
            continue
        right = (np.arange(NUM_EXAMPLES) % 100 >= 2 + seed % 2).astype(np.uint8)
        bits, latency = kind.get("bits"), 0.4 if model == "convnet" else 9.0
        share = (
            COST[method]
            * 4 ** ((8 - (bits or 8)) / 2)
            * (2 if kind.get("observer") == "minmax" else 1)
        )
        # The wrong ones are near the border.
        flipped = rng.random(NUM_EXAMPLES) < share * np.where(right == 1, 1, 10)
        quantized = np.where(flipped, 1 - right, right).astype(np.uint8)
        simulated = bits is not None and bits < 8
        float_kb = FLOAT_KB[model]
        speed = {"x86": 0.5, "onednn": 0.6, "fbgemm": 0.7, "qnnpack": 1.3}.get(
            kind.get("engine", ""), 1.0
        )
        write_run(
            folder,
            scores={"float": right, "quantized": quantized}
            | ({} if method == "none" else {"fake": quantized}),
            method=method,
            bits=(bits, bits),
            engine=kind.get("engine"),
            observer=kind.get("observer"),
            seed=seed,
            model=model,
            lr=kind.get("lr", 0.001),
            size_kb=(
                float_kb,
                None if simulated else float_kb * (0.26 + 0.02 * rng.random()),
            ),
            latency_ms=(
                latency,
                None if simulated else latency * speed * rng.uniform(0.9, 1.1),
            ),
            seconds=float(rng.uniform(5, 60)),
            simulated=simulated,
            overrides=(f"optimizer.lr={kind.get('lr', 0.001)}",),
            curves=60,
        )
    print(f"{args.count} runs in {args.folder}")


if __name__ == "__main__":
    main()
