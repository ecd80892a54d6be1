"""What tables of a comparison show, and scores of language models to compare."""

import numpy as np


def cells(section, *keys):
    return {
        row.runs[0].folder.name: tuple(row.cells[key] for key in keys)
        for row in section.rows
    }


def language_model(seed, shift, n=300):
    rng = np.random.default_rng(seed)
    losses = rng.normal(3, 0.5, n)
    return {
        "float": losses.astype(np.float32),
        "quantized": (losses + rng.normal(shift, 0.02, n)).astype(np.float32),
    }
