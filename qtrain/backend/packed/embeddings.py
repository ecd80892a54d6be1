"""Embeddings, and the Linear layers that share their weights, as the head
of a GPT-2 does.
"""

from collections.abc import Container
from typing import Any

from torch import nn

from qtrain.backend.packed.formats import PackedFormat
from qtrain.common.validate import choice
from qtrain.functional.spec import CODEBOOKS, CodebookSpec, FloatFormat, QuantSpec

# The first that divides a row; one scale a row where none does
GROUPS = (128, 64, 32)
EMBEDDINGS = ("float", "fp16", "int8", "int4", *CODEBOOKS)
HEADS = ("shared", "separate", "float")


def check_policies(embedding: str, head: str) -> list[str]:
    """Returns what is wrong with the two policies, a line each."""
    return choice("embedding", embedding, EMBEDDINGS) + choice("head", head, HEADS)


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Returns {Linear layer: the embedding whose weight it has}."""
    tables = {
        id(m.weight): name
        for name, m in model.named_modules()
        if type(m) is nn.Embedding
    }
    linears = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    return {
        name: tables[id(m.weight)] for name, m in linears if id(m.weight) in tables
    }


def formats(
    model: nn.Module,
    embedding: str,
    head: str,
    own: Container[str],
    floats: Container[str],
) -> dict[str, PackedFormat | None]:
    """Returns {embedding, or head tied to one: what it becomes, None for
    float}; embeddings first.

    A head that is "separate", or has a setting of its own, is a Linear
    layer like others, and is left out.

    Args:
        embedding: "float", "fp16", "int8" with one scale a row,
            "int4" in groups, "nf4" or "fp4".
        head: "shared" stays one with the embedding, in its format;
            "separate"; or "float".
        own: the layers that have a setting of their own.
        floats: those of them that stay float.
    """
    found: dict[str, PackedFormat | None] = {}
    if embedding != "float":
        tables = [
            name
            for name, layer in model.named_modules()
            if type(layer) is nn.Embedding
        ]
        found = {
            name: _of_table(embedding, model.get_submodule(name))
            for name in tables
            if name not in floats
        }
    for name, table in tied_heads(model).items() if head != "separate" else ():
        if name not in own:
            packed = found.get(table) if head == "shared" else None
            found[name] = packed and PackedFormat(
                packed.method, packed.weight, weight_of=table
            )
    return found


def _of_table(embedding: str, table: Any) -> PackedFormat:
    if embedding == "fp16":
        return PackedFormat("fp16", FloatFormat("float16"), key="embedding: ")
    if embedding in CODEBOOKS:
        codes = CodebookSpec(format=embedding)
        return PackedFormat("weight_only", codes, key="embedding: ")
    bits = int(embedding.removeprefix("int"))
    groups = [
        size for size in GROUPS if table.embedding_dim % size == 0 and bits == 4
    ]
    spec = QuantSpec(
        bits=bits,
        symmetric=True,
        granularity="per_group" if groups else "per_channel",
        group_size=groups[0] if groups else None,
    )
    return PackedFormat("weight_only", spec, key="embedding: ")
