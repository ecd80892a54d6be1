"""Names of modules, as `named_modules` gives them: "block.0.conv" lies in "block.0"."""


def is_within(name: str, outer: str) -> bool:
    """Returns whether a module is `outer` or lies in it.

    >>> is_within("block.0.conv", "block.0"), is_within("block.01", "block.0")
    (True, False)
    """
    return name == outer or name.startswith(f"{outer}.")
