"""Where numbers and pictures go: metrics.jsonl always, TensorBoard and PNG files by choice."""

import json
import re
import struct
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from qtrain.common.files import write_atomically


class Logger:
    """Takes what a run has to show, and shows nothing; a logger overrides what it can show.

    `step` counts optimizer steps of the stage that a metric's name begins with, and
    epochs of all stages where the name ends with a kind of model, as
    "val_accuracy/fake".

    Attributes:
        shows_images: whether a call of `image` has any effect; drawing takes time.
    """

    shows_images = False

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def histogram(self, name: str, values: Tensor, step: int) -> None: ...
    def image(self, name: str, png: bytes, step: int) -> None: ...
    def text(self, name: str, markdown: str, step: int) -> None: ...
    def hparams(self, params: dict[str, Any]) -> None: ...
    def chart(self, title: str, names: list[str]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonLines(Logger):
    """Appends each call of `log` as one line to metrics.jsonl in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self.file = (run_dir / "metrics.jsonl").open("a", buffering=1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self.file.close()


class Pictures(Logger):
    """Writes images and texts into `run_dir`/plots."""

    shows_images = True

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "plots"

    def image(self, name: str, png: bytes, step: int) -> None:
        self._write(f"{name}.png", png)

    def text(self, name: str, markdown: str, step: int) -> None:
        self._write(f"{name}.md", f"{markdown}\n".encode())

    def _write(self, name: str, content: bytes) -> None:
        self.folder.mkdir(exist_ok=True)
        write_atomically(
            self.folder / name.replace("/", "_"), lambda new: new.write_bytes(content)
        )


def _leave_to_caller(args: threading.ExceptHookArgs) -> None:
    """Keeps quiet of a file's error in a thread: TensorBoard's next call raises it again."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


class TensorBoard(Logger):
    """Writes event files into `run_dir`."""

    shows_images = True

    def __init__(self, run_dir: Path) -> None:
        # Imported here: what does not log need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _leave_to_caller
        self.writer = SummaryWriter(str(run_dir))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.writer.add_histogram(name, values, step)

    def image(self, name: str, png: bytes, step: int) -> None:
        # As it is, where SummaryWriter.add_image would take pixels and compress them
        # once more.
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(
            height=height, width=width, colorspace=4, encoded_image_string=png
        )
        self.writer._get_file_writer().add_summary(
            Summary(value=[Summary.Value(tag=name, image=image)]), step
        )

    def text(self, name: str, markdown: str, step: int) -> None:
        self.writer.add_text(name, markdown, step)

    def hparams(self, params: dict[str, Any]) -> None:
        # SummaryWriter.add_hparams would open a second run; this keeps one run folder
        # one run.
        from torch.utils.tensorboard.summary import hparams

        values = {
            k: v if isinstance(v, bool | int | float | str) else str(v)
            for k, v in params.items()
        }
        # The first summary lists columns, and TensorBoard takes the list of any one
        # run for all. Without it the columns are what all runs have, those that
        # differ first.
        for summary in hparams(values, {})[1:]:
            self.writer._get_file_writer().add_summary(summary)

    def chart(self, title: str, names: list[str]) -> None:
        # One axis for several scalars: under Custom Scalars, whose tags are regular expressions.
        from torch.utils.tensorboard.summary import custom_scalars

        tags = [f"{re.escape(name)}$" for name in names]
        layout = {title.partition(" ")[0]: {title: ["Multiline", tags]}}
        self.writer._get_file_writer().add_summary(custom_scalars(layout))

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Loggers(Logger):
    """Passes every call on to several loggers."""

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = loggers
        self.shows_images = any(logger.shows_images for logger in loggers)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        for logger in self.loggers:
            logger.histogram(name, values, step)

    def image(self, name: str, png: bytes, step: int) -> None:
        for logger in self.loggers:
            logger.image(name, png, step)

    def text(self, name: str, markdown: str, step: int) -> None:
        for logger in self.loggers:
            logger.text(name, markdown, step)

    def hparams(self, params: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.hparams(params)

    def chart(self, title: str, names: list[str]) -> None:
        for logger in self.loggers:
            logger.chart(title, names)

    def flush(self) -> None:
        for logger in self.loggers:
            logger.flush()

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
