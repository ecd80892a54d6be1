"""Whether what was read from a file has the shape that its reader relies on."""

from collections.abc import Iterator
from typing import Any


def misfits(found: Any, shape: Any, path: str) -> Iterator[str]:
    """Yields what of `found` has not the given shape."""
    if found is None:
        return
    kind = shape if not isinstance(shape, dict | list) else type(shape)
    if not isinstance(found, kind):
        yield f"{path} is {str(found)[:80]!r}"
    elif isinstance(shape, list):
        for index, value in enumerate(found):
            yield from (
                [f"{path}.{index} is null"]
                if value is None
                else misfits(value, shape[0], f"{path}.{index}")
            )
    elif isinstance(found, dict) and isinstance(shape, dict):
        for key, value in found.items():
            if key in shape or "*" in shape:
                yield from misfits(
                    value, shape.get(key, shape.get("*")), f"{path}.{key}"
                )
