"""What TensorBoard's HPARAMS show of a run's settings."""

from typing import Any

from qtrain.runs.report import Report

# Settings that TensorBoard shows in any case, by its names.
NUMBERS = {
    "batch size": "data.batch_size",
    "epochs": "trainer.epochs",
    "epochs of QAT": "quant.epochs",
    "rate": "optimizer.lr",
    "rate of QAT": "quant.optimizer.lr",
}
SHOWN = {
    *NUMBERS.values(),
    *("model", "data", "seed", "quant", "quant.engine"),
    *("quant.weight.bits", "quant.activation.bits"),
    *("quant.activation.observer", "observer@quant.activation.observer"),
}


def hparams(report: Report) -> dict[str, Any]:
    """Returns the settings that comparisons are made over, and all that the command line set.

    So whatever differs within a sweep is there. TensorBoard puts what differs between
    runs first.
    """
    config, activation = report.config, report.quant["activation"] or {}
    bits = [
        str(spec["bits"]) for spec in (report.quant["weight"], activation) if spec
    ]
    shown = {
        "bits": "/".join(bits) or "-",
        "engine": report.quant["engine"] or "-",
        "method": report.quant["method"],
        "network": report.model,
        "observer": activation.get("observer") or "-",
        "seed": report.seed,
        "trained on": report.data,
    }
    for name, path in NUMBERS.items():
        value = _setting(config, path)
        if value is not None:
            shown[name] = value
    for text in report.overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key not in SHOWN and not key.startswith("hydra"):
            # Of a group the config holds the content, not the name.
            found = _setting(config, key, value)
            shown[key] = "null" if found is None else found
    return shown


def _setting(config: Any, path: str, default: Any = None) -> Any:
    """Returns what the config has under a path such as "quant.epochs", or the default."""
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return default if isinstance(config, dict) else config
