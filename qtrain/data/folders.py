"""Which images a folder holds, and of what class: a folder a class, splits above them or not."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)

KINDS = {
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".ppm",
    ".pgm",
    ".webp",
    ".tif",
    ".tiff",
}
SPLITS = ("train", "val", "test")
SHOWN = 5  # names in a message

Labelled = list[tuple[Path, int]]


def scan(root: Path) -> tuple[dict[str, Labelled], list[str]]:
    """Returns {split: [(file, label)]} and the names of the classes, all in alphabetical order.

    Splits are the folders train, val and test; without train, all below
    `root` is "train".

    Raises:
        ValueError: there is no such folder, or no class in it; a class is
            empty; splits have other classes.
    """
    if not root.is_dir():
        raise ValueError(
            f"root={root}: there is no such folder; name one that holds CLASS/IMAGE, "
            "or train/CLASS/IMAGE with test, and val, beside it"
        )
    parts = {"train": root}
    if _folders(root / "train"):
        parts = {split: root / split for split in SPLITS if (root / split).is_dir()}
    classes = [folder.name for folder in _folders(parts["train"])]
    if len(classes) < 2:
        raise ValueError(
            f"root={root}: holds {len(classes)} folders of a class each, "
            "and needs two; put the images of each class into a folder of its own"
        )
    for split, folder in parts.items():
        _refuse_other_classes(
            folder,
            [child.name for child in _folders(folder)],
            classes,
            split,
        )
    return {
        split: _images(folder, classes) for split, folder in parts.items()
    }, classes


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )


def _refuse_other_classes(
    folder: Path, found: list[str], classes: list[str], split: str
) -> None:
    more = sorted(set(found) - set(classes))
    less = sorted(set(classes) - set(found))
    if more or less:
        facts = [f"has {named(more)}, which train lacks"] if more else []
        facts += [f"lacks {named(less)}, which train has"] if less else []
        raise ValueError(
            f"root={folder.parent}: the classes differ between splits: {split} "
            f"{', and '.join(facts)}; give all splits the same folders"
        )


def _images(folder: Path, classes: list[str]) -> Labelled:
    found, others = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        images = [path for path in files if path.suffix.lower() in KINDS]
        others += [path for path in files if path.suffix.lower() not in KINDS]
        if not images:
            raise ValueError(
                f"root={folder}: the class folder {folder / name} holds no image "
                f"({', '.join(sorted(KINDS))}); put images into it, or remove the class, "
                "from all splits"
            )
        found += [(path, label) for path in images]
    if others:
        log.warning(
            f"data: {len(others)} files are no images, such as {others[0]}; left out"
        )
    return found


def named(names: list[str]) -> str:
    """Returns the first few of some names, and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
