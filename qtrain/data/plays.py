"""The bundled plays, the last of them held back to fine-tune on and to be scored on."""

import hashlib
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qtrain.common.validate import refuse, whole
from qtrain.data.loaders import DataLoaders
from qtrain.data.text import read_text, text

# Bytes of each play, in the order of samples/SHAKESPEARE.md, down its columns
SIZES = (
    *(103_371, 96_227, 154_473, 120_397, 116_147),
    *(125_164, 98_308, 122_288, 88_184, 114_838),
)


def plays(*, held_back: int, **options: Any) -> DataLoaders:
    """Returns the first plays to train on, and the others, split, for all else.

    Args:
        held_back: plays at the end that are not trained on: their beginning is what a
            quantizer's own training takes, then comes validation, then test text.
        options: those of `text`, without paths; its fractions are of the plays held
            back.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    refuse(whole("held_back", held_back, 1, len(SIZES) - 1))
    with as_file(files("qtrain.data") / "samples" / "shakespeare.txt.xz") as path:
        content = read_text(str(path))
    # An empty line behind each
    first = sum(SIZES[:-held_back]) + len(SIZES) - held_back
    with TemporaryDirectory() as folder:
        known, held = (str(Path(folder) / name) for name in ("known", "held"))
        Path(known).write_text(content[:first], encoding="utf-8")
        Path(held).write_text(content[first:], encoding="utf-8")
        whole_text = text(path=known, valid_path=held, test_path=held, **options)
        own = text(path=held, **options)
    both = whole_text.fingerprint + own.fingerprint
    return replace(
        own,
        train=whole_text.train,
        finetune=own.train,
        fingerprint=hashlib.sha256(both.encode()).hexdigest(),
    )
