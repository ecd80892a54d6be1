"""Weights of GPT-2 in Hugging Face's format, every key and shape accounted for."""

from pathlib import Path
from typing import Any

from torch import Tensor

from qtrain.common.gguf import is_gguf
from qtrain.common.network import hub_answers
from qtrain.model.gguf import load_gguf

SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
# What qtrain.model.gpt2 computes: a checkpoint of anything else would load and be
# wrong.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
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
        return load_gguf(name)
    name, is_folder = _folder_or_name(name)
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
        from transformers.pytorch_utils import Conv1D
    except ImportError as err:
        raise ValueError(
            f'pretrained={name}: needs the extra hf (pip install "qtrain[hf]")'
        ) from err
    online = is_folder or hub_answers()
    try:
        config = AutoConfig.from_pretrained(name)
        _refuse_other_architectures(name, config)
        how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = GPT2LMHeadModel.from_pretrained(name, config=config, **how)
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
            f"pretrained={name}: could not be loaded as GPT-2: {reason}"
        ) from err
    tied = model.lm_head.weight.equal(model.transformer.wte.weight)
    _refuse_wrong_keys(name, info, tied=tied)
    transposed = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    weights = {}
    for key, value in model.state_dict().items():
        weight = value.t() if key in transposed else value
        weights[key.removeprefix("transformer.")] = weight.float().contiguous()
    return {size: getattr(config, size) for size in SIZES}, weights


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


def _refuse_other_architectures(name: str, config: Any) -> None:
    allowed = {**FIXED, "n_inner": (None, 4 * getattr(config, "n_embd", 0))}
    problems = [
        f"{key}={getattr(config, key, None)} (supported: "
        f"{' or '.join(map(str, values))})"
        for key, values in allowed.items()
        if getattr(config, key, None) not in values
    ]
    if problems:
        raise ValueError(f"its config.json asks for {', '.join(problems)}")


def _refuse_wrong_keys(name: str, info: dict[str, Any], *, tied: bool) -> None:
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
    if not tied:
        lines.append(
            "mismatch: lm_head.weight has other values than transformer.wte.weight, "
            "to which it is tied"
        )
    if lines:
        raise ValueError(
            f"pretrained={name}: the weights do not fit GPT-2 as its config.json "
            "describes it; "
            "use an undamaged checkpoint\n  " + "\n  ".join(lines)
        )
