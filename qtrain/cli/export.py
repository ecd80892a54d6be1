"""The command `qtrain-export`: a finished run's model as a file for
another runtime.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtrain.cli.interrupt import told
from qtrain.common.plain import plain_lines

TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_1", "q4_0")
EXAMPLE = "example: qtrain-export outputs/runs/... --to gguf --type q8_0"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the file and prints its path; mistakes end with code 1."""
    parser = argparse.ArgumentParser(
        "qtrain-export", description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a finished run"
    )
    parser.add_argument(
        "--to", choices=["gguf"], default="gguf", help="GPT-2 or Llama for llama.cpp"
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="q8_0",
        help="of weights that are not integers yet",
    )
    parser.add_argument(
        "--float",
        action="store_true",
        help="the run's float model, not the converted one",
    )
    parser.add_argument(
        "--output", type=Path, help="a file; by default model.gguf in RUN"
    )
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="of yours, which the run may name",
    )
    args = vars(parser.parse_args(argv))
    args.pop("to")
    try:
        path = export(args.pop("run"), args.pop("output"), args.pop("type"), **args)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    except KeyboardInterrupt:
        sys.exit(told("qtrain-export"))
    except (ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain-export: error: {err}"))


def export(
    run: Path,
    output: Path | None,
    type: str,
    *,
    float: bool = False,
    trust: Sequence[str] = (),
) -> Path:
    """Returns the path of the GGUF file that it has written.

    Args:
        run: the folder of a finished run of a language model.
        output: the file; None: model.gguf in `run`.
        type: see `qtrain.exporter.gguf.Gguf`.
        float: write the float model, not the converted one.
        trust: see `qtrain.runs.artifact.load`.

    Raises:
        ValueError: the folder holds no such run, or the model cannot be
            written so.
    """
    from qtrain.exporter.gguf import Gguf
    from qtrain.runs.alone import tokenizer_of
    from qtrain.runs.artifact import load, load_float
    from qtrain.runs.report import FILE_NAME, load_report

    if not (run / FILE_NAME).is_file():
        raise ValueError(
            f"{run}: holds no {FILE_NAME}; name the folder of a finished run"
        )
    model: Any = (load_float if float else load)(run, trust)
    tokenizer = tokenizer_of(run, load_report(run / FILE_NAME))
    exporter = Gguf(type=type, tokenizer=tokenizer or "bytes")
    path = output or run / exporter.file_name
    exporter.write_model(model, path)
    return path


if __name__ == "__main__":
    main()
