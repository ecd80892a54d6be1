"""Images decoded once, into a file that is mapped into memory: epochs later read no PNG again."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtrain.common.files import write_json

log = logging.getLogger(__name__)

CHUNK = 64  # files that a process decodes at a time
FEW = 512  # files for which starting processes does not pay
MOST_WORKERS = 8


class OtherSizeError(ValueError):
    """An image has not the size of all others."""


OTHER_SIZE = OtherSizeError.__name__  # how the reason begins


@dataclass(frozen=True)
class Decoded:
    """Decoded files.

    Attributes:
        images: uint8 (N, C, H, W), mapped from the disk; zeros where a file
            could not be decoded.
        bad: {place: why it could not be}.
        digest: the SHA-256 of the images.
    """

    images: Tensor
    bad: dict[int, str]
    digest: str


def decode(
    files: Sequence[Path],
    root: Path,
    size: tuple[int, int],
    channels: int,
    cache_dir: Path,
    *,
    fit: bool,
) -> Decoded:
    """Returns the images of `files` below `root`; decodes them if that was not done before.

    Args:
        size: (height, width).
        fit: scale an image until it covers `size`, and cut it to its middle;
            else one of another size is bad.

    Raises:
        ValueError: they do not fit on the disk.
    """
    shape = (len(files), channels, *size)
    folder = cache_dir.expanduser() / _key(files, root, shape, fit)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _require_room(folder.parent, shape)
            folder.mkdir()
            with _removed_if_unfinished(folder):
                _decode_into(folder, files, shape, fit)
    found = json.loads((folder / "done.json").read_text())
    bad = {int(place): reason for place, reason in found["bad"].items()}
    return Decoded(
        torch.from_numpy(_mapped(folder, shape, "c")), bad, found["digest"]
    )


def _key(files: Sequence[Path], root: Path, shape: tuple[int, ...], fit: bool) -> str:
    """Returns a digest of names, sizes and times, and of what is made of the files."""
    stats = ((path, path.stat()) for path in files)
    names = [
        [str(path.relative_to(root)), s.st_size, s.st_mtime_ns] for path, s in stats
    ]
    content = json.dumps([str(root.resolve()), shape, fit, names])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _require_room(folder: Path, shape: tuple[int, ...]) -> None:
    needed, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"cache_dir={folder}: the decoded images take {needed / 1e9:.3f} GB, and "
            f"{free / 1e9:.3f} GB are free; "
            "name a folder on another disk, or a smaller data.size"
        )


@contextmanager
def _removed_if_unfinished(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _mapped(folder: Path, shape: tuple[int, ...], mode: Any) -> "np.memmap[Any, Any]":
    # "c": written to in memory alone, as torch wants to be able to.
    return np.memmap(folder / "images.bin", np.uint8, mode, shape=shape)


def _decode_into(
    folder: Path, files: Sequence[Path], shape: tuple[int, ...], fit: bool
) -> None:
    images = _mapped(folder, shape, "w+")
    chunks = _Chunks([str(path) for path in files], folder, shape, fit)
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if len(files) > FEW else 0
    bad: dict[int, str] = {}
    # Its processes write into the file themselves: what comes back is what went wrong.
    for found in DataLoader(chunks, batch_size=None, num_workers=workers):
        bad |= found
    digest = hashlib.sha256()
    for start in range(0, shape[0], 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]).data)
    images.flush()
    log.info(f"data: {len(files)} images decoded into {folder}")
    write_json(folder / "done.json", {"bad": bad, "digest": digest.hexdigest()})


class _Chunks(Dataset[dict[int, str]]):
    """Decodes a chunk of files where an item is asked for; returns {place: what is wrong}."""

    def __init__(
        self, files: Sequence[str], folder: Path, shape: tuple[int, ...], fit: bool
    ) -> None:
        self.files, self.folder = files, folder
        self.shape, self.fit = shape, fit
        self.images: Any = None  # mapped in the process that writes

    def __len__(self) -> int:
        return -(-len(self.files) // CHUNK)

    def __getitem__(self, index: int) -> dict[int, str]:
        if self.images is None:
            self.images = _mapped(self.folder, self.shape, "r+")
        bad = {}
        for place in range(index * CHUNK, min((index + 1) * CHUNK, len(self.files))):
            try:
                self.images[place] = decoded(
                    self.files[place], self.shape[1:], self.fit
                )
            except Exception as err:  # decoders raise what they like
                bad[place] = f"{type(err).__name__}: {err}".splitlines()[0]
        return bad


def decoded(path: str, shape: tuple[int, ...], fit: bool) -> "np.ndarray[Any, Any]":
    """Returns the image of a file, uint8 (C, H, W); one of 16 bits by its upper 8."""
    channels, height, width = shape
    mode = "RGB" if channels == 3 else "L"
    with Image.open(path) as image:
        found: Any = image
        if found.size != (width, height) and not fit:
            raise OtherSizeError(f"{found.height} x {found.width} pixels")
        if found.mode.startswith("I"):
            found = Image.fromarray((np.asarray(found) >> 8).astype(np.uint8))
        if found.mode != mode:
            found = found.convert(mode)
        if found.size != (width, height):
            found = ImageOps.fit(found, (width, height), Image.Resampling.BILINEAR)
        values = np.asarray(found)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)
