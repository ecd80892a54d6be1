"""Digests of what a float model comes from: code, data and first weights, each read itself.

Not seen are modules imported by a name that is computed, installed packages but for
their versions, and other files that code reads while it trains.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from qtrain.config.build import RunParts
from qtrain.data.loaders import DataLoaders, Loader
from qtrain.runs.checkpoint import digest
from qtrain.train.generators import undisturbed

# The quantizer and measurements have no say in the float
# model; everything else does. Of a checkpoint that is trained
# on, the weights count, which the model holds by then.
SETTINGS = (
    "model",
    "data",
    "task",
    "trainer",
    "optimizer",
    "scheduler",
    "seed",
    "device",
)
# Whose fingerprints are of the content.
OWN_DATA = tuple(
    f"qtrain.data.{name}."
    for name in ("mnist", "text", "arrays", "image_folder", "downloads")
)
PACKAGE = Path(__file__).parents[1]
INSTALLED = {"site-packages", "dist-packages"}

# By path: the module's spec, the SHA-256, the imports. What runs is the file as it
# was when the module was loaded.
_sources: dict[str, tuple[ModuleSpec | None, str, list[str]]] = {}


def float_key(config: DictConfig, parts: RunParts) -> str:
    """Returns a digest of all that determines the float model which a run will train.

    Raises:
        ValueError: the model comes from a script or a notebook, whose code has no
            file that would tell of its changes.
    """
    content: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(config, list(SETTINGS))
    )
    for text in _texts(content):
        if text.startswith("__main__."):
            raise ValueError(
                f"float_cache: no change of {text} could be seen; "
                "put it into a module, or set it to null"
            )
    sources = code(content)
    if _is_own(config):
        # The same data elsewhere are the same data
        for setting in ("root", "cache_dir"):
            content["data"].pop(setting, None)
    for setting in ("save_every", "max_finetuning_steps"):
        content["trainer"].pop(setting)
    for setting in parts.task.sample_settings:
        content["task"].pop(setting)
    train = None if _is_own(config) else one_epoch(parts.data.train)
    weights = tensors(parts.model.state_dict().items())
    found = [sources, parts.data.fingerprint, train, weights]
    return digest([content, *found, torch.__version__, torch.get_num_threads()])


def with_fingerprint(config: DictConfig, data: DataLoaders) -> DataLoaders:
    """Returns the data with a fingerprint of their content, whatever their maker says.

    The training split counts as `calib` has it: `train` may be another in every
    epoch.
    """
    if _is_own(config):
        return data
    loaders = (data.calib, data.val, data.test)
    found = [None if loader is None else one_epoch(loader) for loader in loaders]
    return replace(data, fingerprint=digest(found))


def _is_own(config: DictConfig) -> bool:
    return config.data._target_.startswith(OWN_DATA)


def one_epoch(loader: Loader) -> str:
    """Returns a digest of the epoch after seed 0; where no order is drawn, for any batch size.

    What is no pair of tensors is passed over: the checks before a training tell of
    it.
    """
    with undisturbed(loader):
        if hasattr(loader, "content_digest"):
            return str(loader.content_digest())
        pairs = (batch for batch in loader if isinstance(batch, tuple | list))
        return tensors(part for batch in pairs for part in enumerate(batch))


def tensors(named: Iterable[tuple[Any, Any]]) -> str:
    """Returns a digest of tensors by name; of several of one name, of their rows in turn."""
    hashes: dict[Any, Any] = {}
    kinds = set()
    for name, tensor in named:
        if isinstance(tensor, Tensor):
            kinds.add(f"{name} {tensor.dtype} {list(tensor.shape[1:])}")
            flat = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
            hashes.setdefault(name, hashlib.sha256()).update(flat.numpy())
    return digest(
        [
            sorted(kinds),
            {str(name): found.hexdigest() for name, found in hashes.items()},
        ]
    )


def code(config: Any) -> dict[str, str | None]:
    """Returns {module: SHA-256} of all source that the pipeline and `config` import, anyhow deep.

    Of this package that is nearly all: a choice of what matters would be wrong one
    day, and a training too many does no harm. Of installed packages it is the
    version, where they have one under the name that they are imported by.

    Args:
        config: plain dicts, lists and values; each text that is a dotted name counts.
    """
    found: dict[str, str | None] = {}
    names = [
        f"{__package__}.pipeline",
        *(
            text
            for text in _texts(config)
            if re.fullmatch(r"[^\W\d]\w*(\.\w+)+", text)
        ),
    ]
    asked = set(names)
    known: dict[str, ModuleSpec | None] = {}
    while names:
        for spec in _specs(names.pop(), known):
            path = Path(spec.origin or "")
            if INSTALLED & set(path.parts) and not path.is_relative_to(PACKAGE):
                found[spec.name] = _version(spec.name)
                break
            if spec.has_location and spec.name not in found:
                found[spec.name], imported = _source(spec)
                names += set(imported) - asked
                asked.update(imported)
    return found


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)


def _specs(name: str, known: dict[str, ModuleSpec | None]) -> Iterator[ModuleSpec]:
    """Yields the specs of the packages above `name`, and its own if a module; imports nothing.

    Args:
        known: {dotted name: its spec}, which grows.
    """
    path, parts = None, name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if outer not in known:
            known[outer] = _spec(outer, path)
        spec = known[outer]
        if spec is None:
            return
        yield spec
        path = spec.submodule_search_locations
        if path is None:
            return


def _spec(name: str, path: Any) -> ModuleSpec | None:
    """Returns the spec of a module as it is loaded, which is quick, or else as it is found."""
    loaded: ModuleSpec | None = getattr(sys.modules.get(name), "__spec__", None)
    if loaded is not None:
        return loaded
    finders = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in finders if spec is not None), None)


def _source(spec: ModuleSpec) -> tuple[str, list[str]]:
    """Returns the SHA-256 of a module's file, and what the module imports."""
    path = str(spec.origin)
    # Another one when it is loaded again.
    loaded = getattr(sys.modules.get(spec.name), "__spec__", None)
    if path not in _sources or _sources[path][0] is not loaded:
        content = Path(path).read_bytes()
        imported = _imports(content, spec.parent) if path.endswith(".py") else []
        _sources[path] = loaded, hashlib.sha256(content).hexdigest(), list(imported)
    return _sources[path][1:]


def _imports(content: bytes, package: str | None) -> Iterator[str]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return  # no module to import, if a function that is not called names it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Outside a package; the module expects it, or fails itself
            with suppress(ImportError):
                base = resolve_name("." * node.level + (node.module or ""), package)
                yield from [f"{base}.{alias.name}" for alias in node.names]


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
