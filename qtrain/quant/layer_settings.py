"""What single Linear layers may be, whatever the method makes of others: see `quant.layers`."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.packed.formats import PackedFormat
from qtrain.backend.packed.recurrent import (
    DYNAMIC,
    PROJECTED,
    RecurrentFormat,
    recurrent_layers,
)
from qtrain.common.module_names import is_within
from qtrain.common.validate import mapping, number, refuse, shown
from qtrain.functional.grid import is_narrow
from qtrain.functional.spec import (
    AUTO,
    CODEBOOKS,
    CodebookSpec,
    FloatFormat,
    QuantSpec,
)
from qtrain.simulate.build import is_marked_float

METHODS = ("float", "fp16", "weight_only", "llm_int8", *CODEBOOKS)
CODEBOOK_FIELDS = {"block_size", "double_quant"}
LLM_INT8 = QuantSpec(bits=8, symmetric=True, granularity="per_channel")
THRESHOLD = 6.0


def layer_settings(pattern: str, setting: Any, weight: Any) -> PackedFormat | None:
    """Returns what takes the place of a float layer; None where it stays float.

    Args:
        pattern: of layer names, for messages.
        setting: "float", "fp16", "weight_only", "llm_int8", "nf4", "fp4"; or a
            mapping with any of `method`, the fields of `weight` that differ (of
            weight_only, which is meant without a method), `threshold` (of llm_int8),
            `block_size` and `double_quant` (of nf4 and fp4).
        weight: what weight_only quantizes to where the setting does not say
            otherwise; not settled. Where it is no QuantSpec, that is one of 8 bits.

    Raises:
        ValueError: names the pattern and what is allowed.
    """
    fields = dict(setting) if isinstance(setting, dict) else {"method": setting}
    method = fields.pop("method", "weight_only")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"layers.{pattern}={shown(setting)}: must be {', '.join(METHODS)}, "
            "or a mapping such as {bits: 4} or {method: llm_int8, threshold: 5.0}"
        )
    weight = weight if isinstance(weight, QuantSpec) else QuantSpec()
    allowed = {
        "weight_only": set(vars(weight)),
        "llm_int8": {"threshold"},
        **dict.fromkeys(CODEBOOKS, CODEBOOK_FIELDS),
    }.get(method, set())
    _refuse_unknown(pattern, fields, allowed, method)
    if method == "float":
        return None
    if method == "fp16":
        return PackedFormat("fp16", FloatFormat("float16"))
    if method == "llm_int8":
        threshold = fields.get("threshold", THRESHOLD)
        check_threshold(threshold, f"layers.{pattern}.")
        return PackedFormat("llm_int8", LLM_INT8, threshold)
    spec: QuantSpec | CodebookSpec
    try:
        if method in CODEBOOKS:
            spec = CodebookSpec(format=method, **fields)
        else:
            spec = settle(replace(weight, **fields))
    except ValueError as err:
        raise ValueError(
            "\n".join(f"layers.{pattern}.{line}" for line in str(err).splitlines())
        ) from err
    return PackedFormat("weight_only", spec)


def spec_or_format(
    pattern: str, setting: Any, settle_fields: Callable[[dict[str, Any]], QuantSpec]
) -> Any:
    """Returns the spec of a setting like {"bits": 4}, and of any other what `layer_settings` does.

    Args:
        pattern: of layer names, for messages.
        setting: a value of `quant.layers`.
        settle_fields: makes the fields of a spec that differ into the whole spec.

    Raises:
        ValueError: names the pattern and what is allowed.
    """
    if not isinstance(setting, dict) or "method" in setting:
        return layer_settings(pattern, setting, QuantSpec())
    _refuse_unknown(
        pattern, setting, set(vars(QuantSpec())), "a mapping without a method"
    )
    try:
        return settle_fields(setting)
    except ValueError as err:
        raise ValueError(
            "\n".join(f"layers.{pattern}.{line}" for line in str(err).splitlines())
        ) from err


def _refuse_unknown(
    pattern: str, fields: dict[str, Any], allowed: set[str], owner: str
) -> None:
    has = ", ".join(sorted(allowed)) or "no others"
    refuse(
        f"layers.{pattern}.{k}={shown(v)}: {owner} has {has}"
        for k, v in fields.items()
        if k not in allowed
    )


def read_settings(
    layers: dict[str, Any], read: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Returns {pattern: read(pattern, setting)}.

    Raises:
        ValueError: what `read` refuses, all patterns' lines together.
    """
    refuse(mapping("layers", layers))
    found, problems = {}, []
    for pattern, setting in layers.items():
        try:
            found[pattern] = read(pattern, setting)
        except ValueError as err:
            problems.append(str(err))
    refuse(problems)
    return found


def only_float(layers: Any, reason: str) -> list[str]:
    """Checks settings of which "float" is the only one; the reason says why."""
    if problems := mapping("layers", layers):
        return problems
    return [
        f"layers.{p}={shown(s)}: must be float; {reason}"
        for p, s in layers.items()
        if s != "float"
    ]


def check_threshold(threshold: Any, prefix: str = "") -> None:
    """Raises ValueError where a threshold is neither above 0 nor None."""
    refuse(number(f"{prefix}threshold", threshold, above=0, null=True))


def recurrent_formats(
    model: nn.Module, floats: dict[str, str], weight: QuantSpec
) -> dict[str, RecurrentFormat]:
    """Returns {LSTM or GRU: what it becomes}.

    Args:
        floats: {module that stays float: why}; those that do so by themselves get a
            better reason, in place.
        weight: the format of other layers' weights; settled.
    """
    found = [
        name
        for name in recurrent_layers(model)
        if not is_marked_float(model, name) and not _by_hand(name, floats)
    ]
    floats |= dict.fromkeys(found, DYNAMIC)
    projected = (n for n in floats if _has_projection(model.get_submodule(n)))
    floats |= {n: PROJECTED for n in projected if not _by_hand(n, floats)}
    is_whole = weight.granularity == "per_tensor"
    granularity = "per_tensor" if is_whole else "per_channel"
    spec = settle(replace(LLM_INT8, granularity=granularity))
    return dict.fromkeys(found, RecurrentFormat(spec))


def _has_projection(layer: Any) -> bool:
    return type(layer) is nn.LSTM and layer.proj_size > 0


def _by_hand(name: str, floats: dict[str, str]) -> bool:
    """Returns whether a user set a module, or one around it, to stay float."""
    around = (n for n in floats if is_within(name, n))
    return any(floats[n].startswith(("set by", "has qconfig")) for n in around)


def settings_of(
    model: nn.Module, layers: dict[str, Any], other_specs: bool = False
) -> dict[str, Any]:
    """Returns {Linear or Embedding layer: its setting, or that of what is around it}.

    Args:
        model: the float model.
        layers: {pattern: setting, None for float}.
        other_specs: whether a QuantSpec has an effect on other layers too.

    Raises:
        ValueError: a pattern matches nothing, or nothing on which its setting has an
            effect.
    """
    own = torch_ao.match_layers(model, layers)
    linears = [
        name for name, layer in model.named_modules() if type(layer) is nn.Linear
    ]
    for pattern, setting in layers.items():
        if setting is None or other_specs and isinstance(setting, QuantSpec):
            continue
        if not any(
            fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*") for n in linears
        ):
            raise ValueError(
                f"quant.layers.{pattern}: "
                "has no Linear layer, and this is a setting of theirs"
            )
    found = {}
    for name, layer in model.named_modules():
        around = [n for n in own if is_within(name, n)]
        if around and type(layer) in (nn.Linear, nn.Embedding):
            found[name] = own[max(around, key=len)]
    return found


def settle(weight: QuantSpec) -> QuantSpec:
    """Returns the spec of packed weights with every "auto" replaced: symmetric, per channel.

    Raises:
        ValueError: a field has no packed format; gives the legal choices.
    """
    problems = []
    if weight.bits not in (2, 3, 4, 8):
        problems.append(f"bits={weight.bits}: packed are 2, 3, 4 and 8")
    if weight.reduce_range is True:
        problems.append("reduce_range=true: is for activations; leave it at auto")
    if weight.narrow_range is True and weight.symmetric is False:
        problems.append(
            "narrow_range=true: goes with symmetric=true; leave it at auto"
        )
    if weight.observer is not None:
        name = weight.describe()["observer"]
        problems.append(
            f"observer={name}: weights are taken by their minimum and maximum; "
            "leave it at null"
        )
    if problems:
        raise ValueError("\n".join(problems))
    weight = replace(
        weight,
        symmetric=True if weight.symmetric == AUTO else weight.symmetric,
        granularity="per_channel"
        if weight.granularity == AUTO
        else weight.granularity,
        reduce_range=False,
    )
    return replace(weight, narrow_range=is_narrow(weight))
