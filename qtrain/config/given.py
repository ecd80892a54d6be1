"""Objects of Python in a config: it names them, and `lent` has them at hand while a run lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

TARGET = f"{__name__}.given"

Makers = dict[str, Callable[[], Any]]

_lent: ContextVar[Makers] = ContextVar("lent")


@contextmanager
def lent(makers: Makers) -> Iterator[None]:
    """While entered, `given` finds these objects, in this thread.

    Args:
        makers: {name: what returns the object, or a copy of it}.
    """
    before = _lent.set(makers)
    try:
        yield
    finally:
        _lent.reset(before)


def given(name: str, **_: Any) -> Any:
    """Returns the object of that name; what else the config says of it is for comparisons.

    Raises:
        ValueError: there is none, as in a run's folder.
    """
    maker = _lent.get({}).get(name)
    if maker is not None:
        return maker()
    keyword = "model" if name == "model" else "data"
    raise ValueError(
        f"name={name}: is an object that qtrain.run was given, and that no folder "
        f"holds; give it again in Python: by {keyword}= to qtrain.run, which begins "
        f"anew, or to {'qtrain.load' if keyword == 'model' else 'qtrain.sample_inputs'}"
    )
