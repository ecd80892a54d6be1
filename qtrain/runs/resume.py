"""Resuming: the state of a run's training stages on disk, and its end on a signal.

A state is written when a step or an epoch ends. A run that is killed at any moment
goes on from the last one and ends with the same bits. What comes between and after
the stages is done again, from the same numbers.
"""

import hashlib
import io
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtrain.common.files import OVERRIDES, remove_leftovers, write_atomically
from qtrain.config.reading import command_line, read_config
from qtrain.runs.report import FILE_NAME, load_report
from qtrain.runs.signals import Interrupted, Signals
from qtrain.train.state import FOLDER, Checkpoint, unreadable

STAGES = ("float", "finetuning", "qat")  # in the order of a run
LOGS = ("metrics.jsonl", "events.out.tfevents*")  # files that a run appends to
DIGEST_BYTES = hashlib.sha256().digest_size


class StageCheckpoint(Checkpoint):
    """Keeps a stage's state in RUN/resume/<stage>.pt: a SHA-256, then what torch.save writes."""

    def __init__(self, progress: "Progress", stage: str) -> None:
        super().__init__()
        self.progress, self.stage = progress, stage

    @property
    def must_stop(self) -> bool:
        return self.progress.signals.pending is not None

    def load(self) -> dict[str, Any] | None:
        state = self.progress.read(self.stage)
        if state is not None:
            self.extra.clear()
            self.extra.update(state["extra"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        self.progress.write(self.stage, state | {"extra": self.extra})

    def __enter__(self) -> "Checkpoint":
        self.progress.signals.training = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        signals = self.progress.signals
        signals.training = False
        if kind is None and signals.pending is not None:
            raise Interrupted(signals.pending)


class Progress:
    """The states of a run's stages, while it is not complete.

    Args:
        run_dir: the run's folder.
        key: a digest of all that determines the run.
        resume: go on from the states there are; else they are removed.
        signals: those that the run listens to.
        writes: whether this process writes the states.

    Raises:
        ValueError: a state is damaged, or of another config.
    """

    def __init__(
        self,
        run_dir: Path,
        key: str,
        *,
        resume: bool,
        signals: Signals,
        writes: bool = True,
    ) -> None:
        self.run_dir, self.folder, self.key = run_dir, run_dir / FOLDER, key
        self.signals, self.writes = signals, writes
        if not resume:
            if writes:  # another run's, where the folder is used again
                self.remove()
                for path in list(self._logs()):
                    path.unlink()
            return
        states = [
            state for stage in STAGES if (state := self.read(stage)) is not None
        ]
        if writes:
            remove_leftovers(run_dir)
            if self.folder.is_dir():
                remove_leftovers(self.folder)
            self._rewind_logs(states[-1]["logs"] if states else {})

    def stage(self, name: str) -> Checkpoint:
        """Returns the checkpoint of a stage, one of STAGES."""
        return StageCheckpoint(self, name)

    def has(self, stage: str) -> bool:
        """Returns whether a state of the stage has been written."""
        return self._path(stage).is_file()

    def remove(self) -> None:
        """Forgets all states: the run is complete, or begins."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}.pt"

    def write(self, stage: str, state: dict[str, Any]) -> None:
        """Writes the state of a stage, atomically, with the lengths that the logs have by now."""
        if not self.writes:
            return
        content = io.BytesIO()
        torch.save(
            state
            | {
                "key": self.key,
                "logs": {path.name: path.stat().st_size for path in self._logs()},
            },
            content,
        )
        digest = hashlib.sha256(content.getbuffer()).digest()
        self.folder.mkdir(exist_ok=True)

        def fill(path: Path) -> None:
            with path.open("wb") as file:
                file.write(digest)
                file.write(content.getbuffer())

        write_atomically(self._path(stage), fill)

    def read(self, stage: str) -> dict[str, Any] | None:
        """Returns the state of a stage, or None where it has none."""
        path = self._path(stage)
        if not path.is_file():
            return None
        again = (
            f"delete the folder {self.folder} to train again from the start, "
            "with the same result"
        )
        content = path.read_bytes()
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
            raise ValueError(f"resume={self.run_dir}: {path} is damaged; {again}")
        try:
            state = torch.load(
                io.BytesIO(content[DIGEST_BYTES:]),
                map_location="cpu",
                weights_only=True,
            )
            if not (
                isinstance(state["extra"], dict)
                and all(type(size) is int for size in state["logs"].values())
            ):
                raise ValueError("it holds no state of a training")
            is_ours = state["key"] == self.key
        except Exception as err:  # bytes that are no pickle can raise anything
            raise ValueError(
                f"resume={self.run_dir}: {path} is damaged ({unreadable(err)}); {again}"
            ) from None
        if not is_ours:
            raise ValueError(
                f"resume={self.run_dir}: {path} was written by a run with another "
                "config, other data, other code or another torch; put "
                f"{self.run_dir / 'config.yaml'} and the code back as they were, "
                f"or {again}"
            )
        return state

    def _logs(self) -> Iterator[Path]:
        for pattern in LOGS:
            yield from self.run_dir.glob(pattern)

    def _rewind_logs(self, lengths: dict[str, int]) -> None:
        """Takes from the logs what was written after the state, and will be written again."""
        for path in list(self._logs()):
            if path.name in lengths:
                os.truncate(path, lengths[path.name])
            else:
                path.unlink()


@contextmanager
def with_resume_hint(run_dir: Path) -> Iterator[None]:
    """Lets a signal, a full disk, or the loss of the folder `run_dir`, say how its run goes on."""
    again = f"go on with: qtrain resume={run_dir}"
    try:
        yield
    except Interrupted as err:
        err.args = (f"{err}; {again}",)
        raise
    except OSError as err:
        if not run_dir.is_dir():
            raise OSError(
                f"{run_dir}: this folder was deleted while the run was at work; "
                "start it again"
            ) from err
        if err.errno is None or err.filename is not None:  # it names its path
            raise
        saved = "files already there are unchanged"
        raise OSError(
            f"{run_dir}: could not be written ({err}); {saved}; make room, then {again}"
        ) from err


def open_run(run_dir: Path, extra: list[str]) -> tuple[DictConfig, list[str]]:
    """Returns the config and the overrides of a run that can be continued.

    Args:
        extra: what else stood on the command line; it may repeat the run's settings
            alone.

    Raises:
        ValueError: the folder holds no run, a finished one, or a link; or `extra`
            contradicts it.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"resume={run_dir}: no run to continue: there is no config.yaml; name a "
            "run's folder, or start the run again if it was ended before it wrote one"
        )
    for path in run_dir.rglob("*"):  # logs are appended to, and cut off
        if path.is_symlink():
            raise ValueError(
                f"resume={run_dir}: {path} is a symbolic link, which no run makes, and "
                "would lead the run's output out of its folder; "
                "remove it, or put what it points to in its place"
            )
    if (run_dir / FILE_NAME).is_file():
        try:
            report = load_report(run_dir / FILE_NAME)
        except ValueError as err:
            raise ValueError(
                f"resume={run_dir}: {err}; delete that file to go on with the run"
            ) from err
        if report["status"] == "ok":
            raise ValueError(
                f"resume={run_dir}: this run is finished; see its {FILE_NAME}"
            )
    try:
        config = OmegaConf.create(read_config(run_dir / "config.yaml"))
        overrides = command_line(run_dir)
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(f"resume={run_dir}: {err}") from err
    if not (run_dir / OVERRIDES).is_file():
        raise ValueError(
            f"resume={run_dir}: begun by qtrain 0.1.0, whose training this version "
            "cannot go on with to the same bits; "
            f"start it again: qtrain {shlex.join(overrides)}"
        )
    for override in extra:
        key, _, value = override.partition("=")
        try:
            given = OmegaConf.from_dotlist([f"given={value}"]).given
            own = config.choices.get(key, OmegaConf.select(config, key))
        except OmegaConfBaseException:
            given, own = value, None
        if override not in overrides and ("=" not in override or given != own):
            raise ValueError(
                f"resume={run_dir}: {override} is not what the run has ({key}={own}); "
                "a run goes on with its own config: leave it out, or start another run"
            )
    return config, overrides
