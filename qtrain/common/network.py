"""Downloads from servers that may be out of reach: said soon, and once."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PATIENCE_S = 5.0


@contextmanager
def impatient() -> Iterator[None]:
    """While entered, a download ends if its server is silent for 5 s; urllib would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@cache
def answers(url: str) -> bool:
    """Returns whether a server answers within 5 s, look-up included; asked once a process."""
    found: list[bool] = []
    # A thread, for no timeout ends the look-up of a name.
    thread = threading.Thread(target=lambda: found.append(_answers(url)), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return any(found)


def _answers(url: str) -> bool:
    try:
        urlopen(Request(url, method="HEAD"), timeout=PATIENCE_S).close()
    except HTTPError:  # an answer too
        return True
    except (OSError, ValueError):
        return False
    return True


def hub_answers() -> bool:
    """Returns whether Hugging Face's hub answers; if not, its libraries look in the cache alone."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        # Else they ask again and again, for minutes.
        constants.HF_HUB_OFFLINE = not answers(constants.ENDPOINT)
    return not constants.HF_HUB_OFFLINE
