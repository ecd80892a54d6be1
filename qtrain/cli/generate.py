"""The command `qtrain-generate`: a text from a finished run's model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtrain.common.plain import plain_lines

EXAMPLE = 'example: qtrain-generate outputs/runs/... --prompt "I have a dream" --top-k 30 --max-new-tokens 40'


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the prompt as the run's converted model continues it; mistakes end it with a message and code 1."""
    parser = argparse.ArgumentParser("qtrain-generate", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run of a language model")
    parser.add_argument("--prompt", default="I have a dream")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=None, help="draw among the k likeliest tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust", nargs="+", default=[], metavar="PACKAGE", help="of yours, which the run may name")
    args = parser.parse_args(argv)
    try:
        print(generate(**vars(args)))
    except (ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain-generate: error: {err}"))


def generate(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    top_k: int | None,
    seed: int,
    trust: Sequence[str] = (),
) -> str:
    """Returns the prompt and what the converted model of `runs` adds to it.

    Args:
        run: the folder of a finished run.
        prompt: a text of at least one token.
        max_new_tokens, greedy, temperature, top_k, seed: see `GPT2.generate`.
        trust: see `qtrain.runs.artifact.load`.

    Raises:
        ValueError: the folder holds no run of a language model, or an argument is out of range.
    """
    from qtrain.analyze.measure import keep_freed_memory
    from qtrain.data.tokenizer import load_tokenizer
    from qtrain.runs.artifact import load
    from qtrain.runs.report import FILE_NAME, load_report

    if not (run / FILE_NAME).is_file():
        raise ValueError(f"{run}: holds no {FILE_NAME}; name the folder of a finished run of a language model")
    model: Any = load(run, trust)
    data = load_report(run / FILE_NAME)["config"].get("data")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(tokenizer, str) or not hasattr(model, "generate"):
        raise ValueError(f"{run}: this run's {type(model).__name__} generates no text; name a run of a language model")
    keep_freed_memory()
    encoder = load_tokenizer(tokenizer)
    if not prompt:
        raise ValueError("prompt: is empty; give a text of at least one token")
    tokens = model.generate(
        encoder.encode(prompt)[None],
        max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return encoder.decode(tokens[0])


if __name__ == "__main__":
    main()
