"""Files that must not be lost or half written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MOST_BYTES = 64 * 2**20  # of a report, which has a few kilobytes
# What stood on a run's command line; a refused second start rewrites Hydra's own record.
OVERRIDES = "overrides.json"
LOCK = ".lock"  # in the folder of a run, held by the process that is at work there


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that `path` holds either all of the new content or what it held before.

    Args:
        write: called with the path of a new file, on the same disk, to fill.

    Raises:
        OSError: the folder cannot be written or the disk is full; what was at `path`
            stays.
    """
    try:
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}."
        ) as folder:
            # torch.save writes the file's stem before each tensor: one letter keeps
            # it small.
            new = Path(folder) / "w"
            write(new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    except (OSError, RuntimeError) as err:  # the latter of torch's zip writer
        reason = err if isinstance(err, OSError) else f"is the disk full? {err}"
        raise OSError(
            f"{path}: could not be written ({reason}); "
            "files already there are unchanged"
        ) from err


def remove_leftovers(folder: Path) -> None:
    """Removes what `write_atomically` had not finished in `folder` when its process was killed.

    No other process may be writing there.
    """
    for path in folder.glob(".*.*"):
        if path.is_dir() and {child.name for child in path.iterdir()} <= {"w"}:
            shutil.rmtree(path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, lambda new: new.write_text(text))


def require_file(path: Path) -> None:
    """Makes sure that `path` is a file: no folder, and no pipe or device to be read without end.

    Raises:
        ValueError: it is not, or is not there.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: "
            + ("is no regular file" if path.exists() else "there is no such file")
        )


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Returns the text of a file that anyone may have written.

    Raises:
        ValueError: it is no file, no UTF-8, or larger than `most_bytes`.
        OSError: it cannot be read.
    """
    require_file(path)
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes // 2**20} MB")
    return content.decode()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Raises:
        ValueError: there is no such file.
    """
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """While entered, no other process works in `run_dir`; the system frees a dead one's lock.

    Raises:
        ValueError: one does.
    """
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(run_dir / LOCK, timeout=0))
        except Timeout as err:
            raise ValueError(
                f"{run_dir}: another process is at work there; wait for its end, "
                "or name another folder with hydra.run.dir"
            ) from err
        yield
