"""Weights of GPT-2 and Llama in Hugging Face's format, every key and shape accounted for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qtrain.common.gguf import is_gguf
from qtrain.common.network import hub_answers
from qtrain.model.gguf import load_gpt2_file, load_llama_file

Mistakes = Callable[[Any], list[str]]

SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
# What qtrain.model.gpt2 computes: a checkpoint of anything else would load and be wrong.
GPT2: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# The same of qtrain.model.llama
LLAMA: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
}
CLASSES = {"GPT-2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# What a checkpoint has of its own, whatever the model is given
OWN = {*SIZES, *LLAMA_SIZES, "rope_theta", "tied_head"}
LLAMA_NAMES = {  # parts of keys: theirs, ours
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "model.layers": "h",
    "self_attn": "attn",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}


def load_gpt2(name: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns the sizes and the weights of a GPT-2 checkpoint, for `qtrain.model.gpt2.GPT2`.

    Args:
        name: a folder written by `save_pretrained`, a GGUF file (FILE.gguf, extra
            gguf), or a model on the Hugging Face hub such as "gpt2", "gpt2-medium".

    Returns:
        sizes: vocab_size, n_positions, n_layer, n_head, n_embd.
        weights: float32 by GPT2's own keys; Conv1D's [in, out] transposed to Linear's
            [out, in].

    Raises:
        ValueError: transformers is not installed, the name is no checkpoint, its
            architecture is not GPT-2's as published, or keys are missing, unexpected
            or of another shape (all are listed).
    """
    if is_gguf(name):
        return load_gpt2_file(name)
    config, model = _read(name, "GPT-2", _gpt2_mistakes)
    from transformers.pytorch_utils import Conv1D

    transposed = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    weights = {
        key.removeprefix("transformer."): (value.t() if key in transposed else value)
        .float()
        .contiguous()
        for key, value in model.state_dict().items()
    }
    return {size: getattr(config, size) for size in SIZES}, weights


def load_llama(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns settings and weights of a Llama checkpoint, for `qtrain.model.llama.Llama`.

    Args:
        name: as of `load_gpt2`.

    Returns:
        settings: its sizes, norm_eps and rope_theta.
        weights: float32 by Llama's own keys; without the head's where it is tied.

    Raises:
        ValueError: as `load_gpt2`.
    """
    if is_gguf(name):
        return load_llama_file(name)
    config, model = _read(name, "Llama", _llama_mistakes)
    settings = {ours: getattr(config, theirs) for ours, theirs in LLAMA_SIZES.items()}
    weights = {}
    for key, value in model.state_dict().items():
        for theirs, ours in LLAMA_NAMES.items():
            key = key.replace(theirs, ours)
        weights[key] = value.float().contiguous()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return {**settings, "rope_theta": _rope(config)["rope_theta"]}, weights


def _rope(config: Any) -> dict[str, Any]:
    """Returns rope_theta and rope_type, wherever this version of transformers has them."""
    found = getattr(config, "rope_parameters", None) or {
        "rope_theta": getattr(config, "rope_theta", 1e4),
        **(getattr(config, "rope_scaling", None) or {}),
    }
    return {"rope_type": found.get("type", "default"), **found}  # older files: type


def _read(name: str, title: str, mistakes: Mistakes) -> tuple[Any, Any]:
    """Returns config and model of a checkpoint, as transformers reads it.

    Args:
        title: of the architecture: GPT-2 or Llama.
        mistakes: returns what a config asks for that is not supported.
    """
    name, is_folder = _folder_or_name(name)
    try:
        import transformers
    except ImportError as err:
        raise ValueError(
            f'pretrained={name}: needs the extra hf (pip install "qtrain[hf]")'
        ) from err
    kind = getattr(transformers, CLASSES[title])
    online = is_folder or hub_answers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if problems := mistakes(config):
            raise ValueError(f"its config.json asks for {', '.join(problems)}")
        model, info = kind.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as err:  # OSError, ValueError and the file formats' own
        if not online:
            raise ValueError(
                f"pretrained={name}: the hub does not answer, and the model was not "
                "downloaded before; go online, "
                "or name a folder written by save_pretrained"
            ) from err
        # Theirs have lines, of which ours would make mistakes of their own.
        reason = " ".join(str(err).split())
        raise ValueError(
            f"pretrained={name}: could not be loaded as {title}: {reason}"
        ) from err
    _refuse_wrong_keys(name, title, info, model)
    return config, model


def _folder_or_name(name: str) -> tuple[str, bool]:
    """Returns the path of a folder, or a name on the hub, and whether it is a folder."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"pretrained={name}: the folder is no checkpoint, for it holds no "
                "config.json; name a folder written by save_pretrained, "
                "or a model on the hub such as gpt2"
            )
        return str(folder), True
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"pretrained={name}: there is no such folder; "
            "name one, or a model on the hub such as gpt2"
        )
    return name, False


def _gpt2_mistakes(config: Any) -> list[str]:
    width = getattr(config, "n_embd", 0)
    return _unsupported(config, {**GPT2, "n_inner": (None, 4 * width)})


def _llama_mistakes(config: Any) -> list[str]:
    problems = _unsupported(config, LLAMA)
    if problems:
        return problems
    width = config.hidden_size // config.num_attention_heads
    problems = _unsupported(config, {"head_dim": (None, width)})
    if _rope(config)["rope_type"] != "default":
        problems.append(
            f"rope_type={_rope(config)['rope_type']} (supported: default)"
        )
    return problems


def _unsupported(config: Any, allowed: dict[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{key}={getattr(config, key, None)} (supported: "
        f"{' or '.join(map(str, values))})"
        for key, values in allowed.items()
        if getattr(config, key, None) not in values
    ]


def _refuse_wrong_keys(
    name: str, title: str, info: dict[str, Any], model: Any
) -> None:
    table = model.get_input_embeddings().weight
    shapes = sorted(
        (key, tuple(found), tuple(wanted))
        for key, found, wanted in info["mismatched_keys"]
    )
    lines = [
        *(f"missing: {key}" for key in sorted(info["missing_keys"])),
        *(f"unexpected: {key}" for key in sorted(info["unexpected_keys"])),
        *(
            f"mismatch: {key} has shape {found}, config.json asks for {wanted}"
            for key, found, wanted in shapes
        ),
        *(f"error: {message}" for message in info.get("error_msgs", ())),
    ]
    key = next(key for key, p in model.named_parameters() if p is table)
    if model.config.tie_word_embeddings and not model.lm_head.weight.equal(table):
        lines.append(
            f"mismatch: lm_head.weight has other values than {key}, to which it is tied"
        )
    if lines:
        raise ValueError(
            f"pretrained={name}: the weights do not fit {title} as its config.json "
            "describes it; "
            "use an undamaged checkpoint\n  " + "\n  ".join(lines)
        )
