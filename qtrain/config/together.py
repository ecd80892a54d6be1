"""Model, data and task that belong together: who names one of them means the others too."""

TEXT = {
    "model": ("gpt2_nano", "gpt2", "llama_nano", "llama"),
    "data": ("shakespeare", "plays", "text"),
    "task": ("language_modeling",),
}


def partners(overrides: list[str]) -> list[str]:
    """Returns the overrides that go with what a command line names, each with its group's first.

    What it names itself wins, and so does an experiment, which has a model, data and
    a task.

    >>> partners(["model=gpt2", "seed=1"]), partners(["data=text", "model=mlp"])
    (['data=shakespeare', 'task=language_modeling'], [])
    >>> partners(["model=gpt2_nano", "data=plays"])
    ['task=language_modeling']
    """
    named = dict(text.split("=", 1) for text in overrides if "=" in text)
    values = {group: named[group].split(",") for group in TEXT if group in named}
    if not values or named.get("experiment", "null") != "null" or "resume" in named:
        return []
    if any(
        value not in TEXT[group]
        for group, chosen in values.items()
        for value in chosen
    ):
        return []
    return [
        f"{group}={options[0]}"
        for group, options in TEXT.items()
        if group not in named
    ]
