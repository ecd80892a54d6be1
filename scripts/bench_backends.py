"""Inference speed of int8 networks: float, each engine, and ONNX Runtime's int8.

    python scripts/bench_backends.py [--threads 1 2] [--rounds N] [--cpu] [--quick]

`convnet` (batch 1, 64), torchvision's `resnet18` and `mobilenet_v2` (224 pixels, batch 1, 8) with
random weights, for values do not matter to speed. The candidates take turns in one process;
figures are medians of the rounds. With --cpu they are the caller's processor time, which other
load on the machine disturbs less; for one thread. ONNX Runtime (extra `peers`) quantizes
torch.onnx's float file by its own `quantize_static`, and is left out where it is not installed;
it has its rounds after all others', whom its threads would disturb: they spin for a
while after each call.
The last line is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision.models.quantization as quantizable
from torch import Tensor, nn

import qtrain
from qtrain.analyze.measure import tune_malloc
from qtrain.backend.find import engines
from qtrain.model.convnet import ConvNet

Call = Callable[[], Any]
SPINS = "onnxruntime"
ENGINES = [name for name, backend in engines().items() if backend.missing() is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--cpu", action="store_true", help="processor time in place of wall-clock"
    )
    parser.add_argument("--quick", action="store_true", help="convnet alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tune_malloc()
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for name, (model, example, batches) in _cases(args.quick).items():
        candidates = _candidates(model, example)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in batches:
                x = example[:1].expand(batch, *example.shape[1:]).contiguous()
                calls = {k: make(x, threads) for k, make in candidates.items()}
                rows = _measure(
                    calls, args.rounds, time.thread_time if args.cpu else None
                )
                key = f"{name}, batch {batch}, {threads} threads"
                found[key] = rows
                shown = "  ".join(f"{k} {v:.3g}" for k, v in rows.items())
                print(f"{key}, ms: {shown}", flush=True)
    print(json.dumps(found))


def _cases(quick: bool) -> dict[str, tuple[nn.Module, Tensor, list[int]]]:
    """Returns {name: (float model, examples, batch sizes)}."""
    cases: dict[str, Any] = {
        "convnet": (ConvNet(width=16, hidden=64), torch.randn(32, 1, 28, 28), [1, 64])
    }
    if not quick:
        for name in ("resnet18", "mobilenet_v2"):
            model = getattr(quantizable, name)(weights=None, quantize=False)
            cases[name] = (model, torch.randn(4, 3, 224, 224), [1, 8])
    return {name: (model.eval(), *rest) for name, (model, *rest) in cases.items()}


def _candidates(
    model: nn.Module, example: Tensor
) -> dict[str, Callable[[Tensor, int], Call]]:
    """Returns {candidate: what makes a call of it, for an input and a number of threads}."""

    def of_torch(module: nn.Module, x: Tensor, threads: int) -> Call:
        return torch.no_grad()(partial(module, x))

    found: dict[str, Callable[[Tensor, int], Call]] = {
        "float": partial(of_torch, model)
    }
    for engine in ENGINES:
        if engine != "reference":
            made = qtrain.quantize(model, [example], engine=engine).model
            found[engine] = partial(of_torch, made)
    if importlib.util.find_spec("onnxruntime"):
        found[SPINS] = _onnxruntime(model, example)
    return found


def _onnxruntime(model: nn.Module, example: Tensor) -> Callable[[Tensor, int], Call]:
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quantize_static,
    )

    folder = Path(tempfile.mkdtemp())

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": example.numpy()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    torch.onnx.export(
        model,
        (example,),
        folder / "float.onnx",
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Batches(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )

    def call(x: Tensor, threads: int) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            folder / "int8.onnx", options, providers=["CPUExecutionProvider"]
        )
        return partial(session.run, None, {"x": x.numpy()})

    return call


def _measure(calls: dict[str, Call], rounds: int, clock: Any) -> dict[str, float]:
    """Returns {candidate: ms}, medians of the rounds in which they take turns; who spins, alone."""
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    spins = {name: call for name, call in calls.items() if name == SPINS}
    others = {name: call for name, call in calls.items() if name != SPINS}
    for block in (others, spins):
        for turn in range(-5, rounds):
            for name, call in block.items():
                start = clock()
                call()
                if turn >= 0:
                    times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(row) for name, row in times.items()}


if __name__ == "__main__":
    main()
