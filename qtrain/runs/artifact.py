"""A finished run's model, back in a fresh process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from torch import Tensor, nn

from qtrain.capture.examples import stand_ins
from qtrain.common.plain import plain
from qtrain.config.old_names import up_to_date
from qtrain.config.trust import require
from qtrain.runs.alone import tokenizer_of
from qtrain.runs.checkpoint import load_weights
from qtrain.runs.old_states import up_to_date_state
from qtrain.runs.report import FILE_NAME, load_report, verify
from qtrain.simulate.points import sites


def load_float(run_dir: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Returns the float model of the run in `run_dir`, in eval mode; see `load`."""
    report = _report(run_dir, trust)
    with _rebuilding(run_dir, "model"):
        model: nn.Module = _make(report, "model")
    _fill(model, run_dir, report, "float.pt")
    return model.eval()


def sample_inputs(run_dir: Path, trust: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """Returns forward's arguments for the first test batch of the run in `run_dir`, on the CPU.

    Raises:
        ValueError: the folder holds no finished run, or names code that is not
            trusted, or its data are not there.
    """
    report = _report(run_dir, trust)
    with _rebuilding(run_dir, "data"):
        own = tokenizer_of(run_dir, report)
        named = {} if own is None else {"tokenizer": own}
        data = _make(report, "data", device="cpu", **named)
        task = _make(report, "task", **named)
        inputs: tuple[Tensor, ...] = task.inputs(next(iter(data.test)))
    return inputs


def load(run_dir: Path, trust: Sequence[str] = ()) -> nn.Module:
    """Returns the converted model of a run, with predictions bit-identical to the run's.

    Its modules are made by the same prepare and convert, uncalibrated, and filled
    from quantized.pt, which is loaded with `weights_only=True`. The model's own
    class, named in the run's config, must be importable.

    Args:
        trust: packages of yours whose code the run may name; torch's and
            torchvision's modules and what qtrain's own config names are harmless, and
            all else is refused.

    Raises:
        ValueError: the folder holds no finished run, names code that is not trusted,
            or its weights are damaged.
    """
    report = _report(run_dir, trust)
    engine = report["quant"].get("engine")  # what "auto" was where the run was made
    with _rebuilding(run_dir, "model"):
        if isinstance(report["config"]["quant"].get("engine"), dict):
            engine = None  # a backend of the user's own
        quantizer = _make(
            report, "quant", **({} if engine is None else {"engine": engine})
        )
        # Without values nothing takes memory but what is read from the file.
        bare = quantizer.is_all_state and _is_all_state(report["config"]["model"])
        with torch.device("meta") if bare else nullcontext():
            model = _make(report, "model")
        example = stand_ins(report.get("capture", {}).get("inputs", []))
        prepared = quantizer.prepare(model, example)
        _refuse_other_capture(report, prepared)
        prepared.leave_float_as(report.get("plan", {}))
        fake = quantizer.fake(prepared) if quantizer.simulated else None
        quantized: nn.Module = quantizer.convert(prepared) if fake is None else fake
    is_simulation = bool(sites(quantized))
    rename = partial(up_to_date_state, model=quantized) if is_simulation else None
    _fill(quantized, run_dir, report, "quantized.pt", rename)
    return quantized


def _refuse_other_capture(report: dict[str, Any], prepared: Any) -> None:
    """Raises ValueError for a run whose model was traced to other layers than it is now."""
    if report.get("capture", {}).get("mode") != "trace" or "plan" not in report:
        return  # a report of schema 1 has no plan
    others = sorted(report["plan"].keys() ^ prepared.plan.keys())
    if others:
        raise ValueError(
            f"another version traced it to other layers: {', '.join(others[:3])}; "
            "run it again"
        )


def _is_all_state(config: dict[str, Any]) -> bool:
    """Returns whether a model can be made without values: not where it reads a checkpoint."""
    made = get_object(config["_target_"])
    return getattr(made, "is_all_state", False) and config.get("pretrained") is None


def _report(run_dir: Path, trust: Sequence[str]) -> dict[str, Any]:
    report = load_report(run_dir / FILE_NAME)
    if report["status"] != "ok":
        raise ValueError(
            f"{run_dir}: this run failed ({plain(str(report.get('error')))}), "
            "so there is no model to load"
        )
    report["config"] = up_to_date(report["config"])
    model = report["config"].get("model")
    if isinstance(model, dict):
        model |= report.get("without_files", {})
    require(report["config"], trust, str(run_dir / FILE_NAME))
    return report


def _make(report: dict[str, Any], key: str, **changes: Any) -> Any:
    return instantiate(report["config"][key] | changes, _convert_="all")


@contextmanager
def _rebuilding(run_dir: Path, what: str) -> Iterator[None]:
    """Draws no random number, and makes one error of all that constructors make of arguments."""
    try:
        with torch.random.fork_rng():
            yield
    except Exception as err:
        reason = plain(" ".join(f"{type(err).__name__}: {err}".split()))
        raise ValueError(
            f"{run_dir}: the {what} of its {FILE_NAME} cannot be made here ({reason})"
        ) from err


def _fill(
    model: nn.Module,
    run_dir: Path,
    report: dict[str, Any],
    name: str,
    rename: Any = None,
) -> None:
    # First, for it knows better what is wrong with a file that is cut or no model
    load_weights(model, run_dir / name, rename)
    verify(run_dir, report, name)
