"""Generation speed of GPT-2 124M or SmolLM2-135M: transformers', qtrain's fp32 and integer formats.

    python scripts/bench_generation.py [--model gpt2|llama] [--threads N] [--rounds N]
    [--prompt N]
        [--new N] [--only NAME...]

Random weights, for values do not matter to speed; batch 1, greedy, with the KV cache.
Prefill reads a prompt of 128 tokens and computes the last one's logits; decoding goes
on token by token. The models take turns in one process, in each turn several calls of
one model in a row; figures are medians of the rounds. A model that reads all of its
weights for every token decodes at most `bandwidth / bytes of weights` tokens a
second; bandwidth is measured in each round, by summing 512 MB. transformers (extra
`hf`) and llama.cpp (extras `gguf`, `llamacpp`; the same weights in its own types) are
left out where they are not installed. The last line is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from qtrain.analyze.measure import tune_malloc, weight_bytes
from qtrain.config.build import compose
from qtrain.exporter.gguf import Gguf
from qtrain.model.gpt2 import GPT2
from qtrain.model.kv_cache import KVCache
from qtrain.model.language_model import LanguageModel
from qtrain.model.llama import Llama
from qtrain.model.pretrained import LLAMA_SIZES

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"] + [
    "int8"
]
METHODS = {
    "qtrain fp32": ["quant=none"],
    "qtrain bf16": ["quant=bf16"],
    **{
        f"qtrain dynamic {engine}": ["quant=dynamic", f"quant.engine={engine}"]
        for engine in ENGINES
    },
    **{
        f"qtrain static {engine}": ["quant=ptq", f"quant.engine={engine}"]
        for engine in ENGINES
        if engine != "qnnpack"
    },
    "qtrain weight_only int8": ["quant=weight_only", "quant.embedding=int8"],
    "qtrain weight_only int4": ["quant=weight_only_int4", "quant.embedding=int4"],
    "qtrain int4, groups of 128": [
        "quant=weight_only_int4",
        "quant.embedding=int4",
        "quant.weight.group_size=128",
    ],
    "qtrain llm_int8": ["quant=llm_int8"],
}
CALLS = 4  # in a row: prefills, and tokens before the clock starts


class Ours:
    """Prefill and decoding with qtrain's model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, prompt: Tensor, room: int) -> Tensor:
        self.cache = KVCache(self.model, 1, prompt.shape[1] + room)
        return self.model(prompt, self.cache, last_only=True)[:, -1]

    def step(self, token: Tensor) -> Tensor:
        return self.model(token, self.cache, last_only=True)[:, -1]


class Theirs:
    """The same with transformers' model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, prompt: Tensor, room: int) -> Tensor:
        output = self.model(prompt, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        return self.model(
            token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]


class LlamaCpp:
    """The same with llama.cpp, by its own clock, on a file that is written for it."""

    def __init__(self, model: LanguageModel, kind: str, threads: int) -> None:
        import xllamacpp

        folder = tempfile.mkdtemp()
        self.path = Path(folder) / f"{kind}.gguf"
        Gguf(type=kind).write_model(model, self.path)
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx = min(model.n_positions, 1024)
        params.n_parallel = 1
        params.n_batch = params.n_ubatch = 512
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)
        self.bytes = sum(
            t.n_bytes for t in gguf_tensors(self.path) if t.name != "position_embd"
        )

    def measure(self, prompt: Tensor, new: int) -> tuple[float, float]:
        prefills = [self._ask(prompt, 1)["prompt_per_second"] for _ in range(CALLS)]
        decode = self._ask(prompt[:, :CALLS], CALLS + new)["predicted_per_second"]
        return statistics.median(prefills), decode

    def _ask(self, prompt: Tensor, count: int) -> dict[str, float]:
        request = {
            "prompt": prompt[0].tolist(),
            "max_tokens": count,
            "ignore_eos": True,
        }
        answer = self.server.handle_completions(
            {**request, "temperature": 0.0, "cache_prompt": False}
        )
        return (answer if isinstance(answer, dict) else json.loads(answer))["timings"]


def gguf_tensors(path: Path) -> Any:
    import gguf

    return gguf.GGUFReader(path).tensors


def transformers_model(like: LanguageModel) -> nn.Module:
    """Returns transformers' model of the same sizes, with random weights of its own."""
    import transformers

    if isinstance(like, Llama):
        sizes = {theirs: getattr(like, ours) for ours, theirs in LLAMA_SIZES.items()}
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval()
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    sizes = {name: getattr(like, name) for name in names}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(runner: Any, prompt: Tensor, new: int) -> tuple[float, float]:
    """Returns tokens per second of prefill and of decoding."""
    if isinstance(runner, LlamaCpp):
        return runner.measure(prompt, new)
    runner.prefill(prompt, 0)
    prefill = statistics.median(
        seconds(lambda: runner.prefill(prompt, new + CALLS)) for _ in range(CALLS)
    )
    token = runner.prefill(prompt[:, :CALLS], new + CALLS).argmax(-1, keepdim=True)
    times = []
    for _ in range(CALLS + new):
        start = time.perf_counter()
        token = runner.step(token).max(-1, keepdim=True).indices
        times.append(time.perf_counter() - start)
    return prompt.shape[1] / prefill, 1 / statistics.median(times[CALLS:])


def read_bytes(runner: Any) -> int:
    """Returns the bytes of weights that a token reads: embeddings only where the head is one."""
    if isinstance(runner, LlamaCpp):
        return runner.bytes
    model = runner.model
    body = getattr(model, "transformer", getattr(model, "model", model))
    blocks = body.layers if hasattr(body, "layers") else body.h
    norm = body.norm if hasattr(body, "norm") else body.ln_f
    return weight_bytes(nn.ModuleList([blocks, norm, model.lm_head]))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument(
        "--only", nargs="+", help="of qtrain's, those with one of these in the name"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as every run does
    torch.manual_seed(0)
    float_model = (Llama if args.model == "llama" else GPT2)().eval()
    models: dict[str, Any] = {}
    if importlib.util.find_spec("transformers"):
        models["transformers fp32"] = Theirs(transformers_model(float_model))
    prompt = torch.randint(float_model.vocab_size, (1, args.prompt))
    chosen = {
        n: s
        for n, s in METHODS.items()
        if not args.only or any(o in n for o in args.only)
    }
    for name, settings in chosen.items():
        quantizer = instantiate(compose(*settings).quant, _convert_="all")
        simulation = quantizer.prepare(float_model)
        quantizer.calibrate(simulation, [(prompt,)])
        models[name] = Ours(quantizer.convert(simulation))
    if all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp")):
        for kind in ("q8_0", "q4_0"):
            models[f"llama.cpp {kind}"] = LlamaCpp(float_model, kind, args.threads)
    block = torch.ones(128 << 20)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    bandwidths = []
    for _ in range(args.rounds):
        bandwidths.append(
            block.nbytes / min(seconds(block.sum) for _ in range(CALLS))
        )
        for name, runner in models.items():
            found[name].append(measure(runner, prompt, args.new))
    bandwidth = statistics.median(bandwidths)
    rows = []
    for name, rates in found.items():
        prefill, decode = (
            statistics.median(column) for column in zip(*rates, strict=True)
        )
        limit = bandwidth / read_bytes(models[name])
        rows.append(
            {
                "model": name,
                "prefill": prefill,
                "decode": decode,
                "of_limit": decode / limit,
            }
        )
    print(
        f"{args.threads} threads, prompt {args.prompt}, {args.rounds} rounds; "
        f"reads {bandwidth / 1e9:.1f} GB/s"
    )
    print(
        f"{'tokens/s':25} {'prefill':>8} {'ratio':>6} {'decode':>8} {'ratio':>6} "
        f"{'of the bandwidth limit':>23}"
    )
    for row in rows:
        ratios = [row[key] / rows[0][key] for key in ("prefill", "decode")]
        print(
            f"{row['model']:25} {row['prefill']:8.0f} {ratios[0]:5.2f}x {row['decode']:8.1f} "
            f"{ratios[1]:5.2f}x {100 * row['of_limit']:21.0f} %"
        )
    print(
        json.dumps(
            {
                "threads": args.threads,
                "bandwidth_gb_s": bandwidth / 1e9,
                "tokens_per_s": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
