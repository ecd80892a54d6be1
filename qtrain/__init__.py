"""qtrain: eager-mode quantization in PyTorch, from float to PTQ and QAT to real int8.

result = qtrain.quantize(model, batches)     # an int8 model, and what it is worth
simulation = qtrain.prepare(model)           # for a training loop of one's own
model = qtrain.convert(simulation)
qtrain.export(simulation, images, "folder")  # for other runtimes, as torch.export
report = qtrain.run("quant=ptq")             # what the command qtrain does
model = qtrain.load("outputs/runs/...")
"""

from importlib import import_module

# typing takes 4 ms to import, in which Ctrl-C would find no handler
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from qtrain.api.exports import export
    from qtrain.api.quantize import Quantized, quantize
    from qtrain.api.runs import compare, load, load_float, run, sample_inputs
    from qtrain.api.training import convert, prepare
    from qtrain.backend.torch_ao import DeQuantStub, FloatFunctional, QuantStub, fuse

    __version__: str

__all__ = [
    "DeQuantStub",
    "FloatFunctional",
    "QuantStub",
    "Quantized",
    "compare",
    "convert",
    "export",
    "fuse",
    "load",
    "load_float",
    "prepare",
    "quantize",
    "run",
    "sample_inputs",
]
_HOMES = {
    "qtrain.api.exports": ("export",),
    "qtrain.api.quantize": ("Quantized", "quantize"),
    "qtrain.api.runs": ("compare", "load", "load_float", "run", "sample_inputs"),
    "qtrain.api.training": ("convert", "prepare"),
    "qtrain.backend.torch_ao": (
        "DeQuantStub",
        "FloatFunctional",
        "QuantStub",
        "fuse",
    ),
}


def __getattr__(name: str) -> "Any":
    # Only what is used is imported: torch takes seconds, and qtrain-compare does
    # without it.
    if name == "__version__":
        return import_module("importlib.metadata").version("qtrain")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
