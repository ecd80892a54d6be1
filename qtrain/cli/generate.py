"""The command `qtrain-generate`: a text from a finished run's model."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli.interrupt import told
from qtrain.common.plain import plain_lines

if TYPE_CHECKING:
    from torch import Tensor

    from qtrain.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # the first bytes of a character, until the others come

EXAMPLE = (
    'example: qtrain-generate outputs/runs/... --prompt "I have a dream" '
    "--top-k 30 --max-new-tokens 40"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the prompt as the converted model continues it; mistakes end with code 1."""
    args = _parser().parse_args(argv)
    pace = Pace()
    try:
        for text in generate(**vars(args), pace=pace):
            print(text, end="", flush=True)
        print()
        print(pace, file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(told("qtrain-generate"))
    except BrokenPipeError:  # as of `| head`; the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain-generate: error: {err}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "qtrain-generate", description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the folder of a finished run of a language model",
    )
    parser.add_argument("--prompt", default="I have a dream")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument(
        "--greedy", action="store_true", help="take the likeliest token each time"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--top-k", type=int, default=None, help="draw among the k likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=None,
        help="draw among the likeliest that make up p",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: tokens come less often again",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end before the first of these texts",
    )
    parser.add_argument(
        "--cache",
        choices=["float", "int8"],
        default="float",
        help="how keys and values are kept",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="of yours, which the run may name",
    )
    return parser


def generate(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    stop: Sequence[str] = (),
    cache: str = "float",
    trust: Sequence[str] = (),
    pace: "Pace | None" = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yields the prompt, and what the converted model of a run adds to it, as it comes.

    Args:
        run: the folder of a finished run.
        prompt: a text of at least one token.
        max_new_tokens, seed, cache: see `LanguageModel.generate`.
        stop: texts; the first that comes ends it, and is left out.
        trust: see `qtrain.runs.artifact.load`.
        pace: what measures how fast tokens come.
        sampling: see `qtrain.model.sampling.Sampling`.

    Raises:
        ValueError: the folder holds no run of a language model, or an argument is out
            of range.
    """
    from qtrain.analyze.measure import tune_malloc
    from qtrain.data.tokenizer import load_tokenizer
    from qtrain.model.sampling import Sampling

    model, tokenizer = _load(run, trust)
    tune_malloc()
    encoder = load_tokenizer(tokenizer)
    if "" in stop:
        raise ValueError("stop: a text is empty; leave it out")
    if not prompt:
        raise ValueError("prompt: is empty; give a text of at least one token")
    tokens = encoder.encode(prompt)
    own = {} if cache == "float" else {"cache": cache}
    if hasattr(model, "stream"):
        chosen = Sampling(**sampling)
        new = model.stream(tokens[None], max_new_tokens, chosen, seed=seed, **own)
    else:  # a model of the user's own, which may know fewer settings
        usual = vars(Sampling())
        own |= {
            name: value for name, value in sampling.items() if value != usual[name]
        }
        whole = model.generate(tokens[None], max_new_tokens, seed=seed, **own)
        new = whole[:, len(tokens) :].split(1, dim=1)
    if pace is not None:
        new = pace.watch(new)
    return until(stop, pieces(encoder, tokens, new))


def _load(run: Path, trust: Sequence[str]) -> tuple[Any, str]:
    """Returns a run's converted model, and the name of its tokenizer."""
    from qtrain.runs.alone import tokenizer_of
    from qtrain.runs.artifact import load
    from qtrain.runs.report import FILE_NAME, load_report

    if not (run / FILE_NAME).is_file():
        raise ValueError(
            f"{run}: holds no {FILE_NAME}; "
            "name the folder of a finished run of a language model"
        )
    model: Any = load(run, trust)
    tokenizer = tokenizer_of(run, load_report(run / FILE_NAME))
    if tokenizer is None or not hasattr(model, "generate"):
        raise ValueError(
            f"{run}: this run's {type(model).__name__} generates no text; "
            "name a run of a language model"
        )
    return model, tokenizer


class Pace:
    """How fast tokens come: the time to the first one, and the rate from then on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def watch(self, tokens: "Iterable[Tensor]") -> "Iterator[Tensor]":
        """Yields the tokens, and notes when each has come."""
        self.times = [time.perf_counter()]
        for token in tokens:
            self.times.append(time.perf_counter())
            yield token

    def __str__(self) -> str:
        start, *times = self.times
        said = f"{len(times)} tokens, the first after {times[0] - start:.2f} s"
        if len(times) < 2:
            return said
        return (
            f"{said}, then {(len(times) - 1) / (times[-1] - times[0]):.1f} a second"
        )


def until(stop: Sequence[str], texts: Iterator[str]) -> Iterator[str]:
    """Yields the texts: the prompt, and what follows, up to the first of `stop` in it.

    What may be the beginning of such a text is held back until it is known.

    >>> list(until(["end"], iter(["the end?", " an e", "ndless", "!"])))
    ['the end?', ' an ', '']
    >>> "".join(until(["end"], iter(["", "an e", "n", "o"])))
    'an eno'
    """
    yield next(texts, "")
    held = ""
    for text in texts:
        held += text
        found = [held.index(word) for word in stop if word in held]
        if found:
            yield held[: min(found)]
            return
        ends = [
            n for word in stop for n in range(len(word)) if held.endswith(word[:n])
        ]
        keep = len(held) - max(ends, default=0)
        yield held[:keep]
        held = held[keep:]
    yield held


def pieces(
    encoder: "Tokenizer", tokens: "Tensor", new: "Iterable[Tensor]"
) -> Iterator[str]:
    """Yields the text of `tokens` (N,) and of each that follows, (1, 1), in whole characters."""
    found, told = tokens.tolist(), 0
    for token in chain([None], new):
        found += [] if token is None else token[0].tolist()
        text = encoder.decode(found).rstrip(UNFINISHED)
        yield text[told:]
        told = len(text)
    yield encoder.decode(found)[told:]


if __name__ == "__main__":
    main()
