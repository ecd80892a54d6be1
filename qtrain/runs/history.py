"""What will run, and about how long: told by reports of earlier runs beside this one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtrain.runs.report import FILE_NAME, load_report
from qtrain.runs.sweep import count_jobs, grid, jobs, jobs_at_once

MOST_READ = 200  # reports, the newest; each takes a millisecond or two
# Runs that agree in these, and in their groups' files, take about as long.
KIND = (
    "trainer.epochs",
    "trainer.max_steps",
    "quant.epochs",
    "trainer.max_finetuning_steps",
)


def duration(seconds: float) -> str:
    """Returns a time in words.

    >>> duration(40), duration(400), duration(40000)
    ('40 s', '7 min', '11 h 7 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return (
        f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def announce(config: DictConfig, hydra_config: Any) -> str:
    """Returns the first line of a run: what it does and, if one like it is known, for how long."""
    choices = hydra_config.runtime.choices
    epochs, steps, more, _ = kind = [OmegaConf.select(config, key) for key in KIND]
    is_trained = config.checkpoint is None or config.checkpoint_mode != "use"
    line = f"{choices.model} on {choices.data}: float"
    if config.checkpoint is not None:
        line += f" from {config.checkpoint}" + ", trained on" * is_trained
    if is_trained:
        line += f" for {_count(epochs, 'epoch')}"
        if steps is not None:
            line += f", at most {_count(steps, 'step')}"
    if choices.quant != "none":
        line += f", then {choices.quant}"
    if more is not None:
        line += f" for {_count(more, 'epoch')}"
    wanted = [choices.model, choices.data, choices.quant, *kind]
    folders = _runs(hydra_config) | _sweeps(hydra_config)
    same = [report for report in _finished(folders) if _kind(report) == wanted]
    if not same:
        return line
    training = next((_training(report) for report in same if _training(report)), None)
    rest = _seconds(same[0]) - _training(same[0])
    if not is_trained:
        return f"{line}; about {duration(rest)}, as the last such run"
    if training is None:  # all such runs had their float model from elsewhere
        return line
    if config.float_cache is None or training < 1:
        return f"{line}; about {duration(rest + training)}, as the last such run"
    return (
        f"{line}; about {duration(rest)}, "
        f"and {duration(training)} if the float model is not in the cache"
    )


def announce_sweep(hydra_config: DictConfig) -> str:
    """Returns the first line of a sweep: what it varies and, if all are known, for how long."""
    found = grid(hydra_config)
    if found is None:
        return f"a search by {hydra_config.runtime.choices['hydra/sweeper']}"
    varied = " ".join(
        str(override.input_line) for override in found if override.is_sweep_override()
    )
    line = f"{_count(count_jobs(hydra_config), 'job')}: {varied}".removesuffix(": ")
    known: dict[frozenset[str], float] = {}
    for report in _finished(_sweeps(hydra_config)):
        known.setdefault(frozenset(report["overrides"]), _seconds(report))
    took = []
    for job in jobs(found):
        if frozenset(job) not in known:
            return line
        took.append(known[frozenset(job)])
    seconds = sum(took) / min(len(took), jobs_at_once(hydra_config))
    return f"{line}; about {duration(seconds)}, as these jobs took last"


def _count(number: Any, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _finished(patterns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the reports of finished runs, newest first; patterns: by folder, if below it."""
    paths = [
        path
        for folder, pattern in patterns.items()
        for path in Path(folder).glob(pattern)
    ]
    for path in sorted(paths, key=_written, reverse=True)[:MOST_READ]:
        try:
            report = load_report(path)
        except ValueError:  # qtrain-compare says what is wrong with it
            continue
        if report["status"] == "ok":
            yield report


def _runs(hydra_config: Any) -> dict[str, str]:
    return {
        str(_from_start(hydra_config, hydra_config.run.dir).parent): f"*/{FILE_NAME}"
    }


def _sweeps(hydra_config: Any) -> dict[str, str]:
    return {
        str(
            _from_start(hydra_config, hydra_config.sweep.dir).parent
        ): f"*/*/{FILE_NAME}"
    }


def _from_start(hydra_config: Any, folder: Any) -> Path:
    """Returns a folder as meant from that of the start, which hydra.job.chdir has left."""
    return Path(str(hydra_config.runtime.cwd or ".")) / str(folder)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a job that begins again has just removed it
        return 0.0


def _kind(report: dict[str, Any]) -> list[Any]:
    names = [report["model"], report["data"], report["quant"].get("method")]
    return [*names, *(_at(report["config"], key) for key in KIND)]


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _seconds(report: dict[str, Any]) -> float:
    return sum(seconds or 0.0 for seconds in report["time_s"].values())


def _training(report: dict[str, Any]) -> float:
    return report["time_s"].get("float_training") or 0.0
