"""Reading vectors that torch.save wrote, without torch: importing it costs more than comparing 1,000 runs."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from qtrain.common.files import require_file

DTYPES = {
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "BoolStorage": np.bool_,
    "LongStorage": np.int64,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the content of a file with a dict of vectors; nothing else in its pickle is carried out.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = description.removesuffix("data.pkl")
            with archive.open(description) as file:
                found = _Unpickler(file, archive, folder).load()
    except Exception as err:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not readable as tensors ({type(err).__name__}: {err})") from err
    if not isinstance(found, dict) or not all(
        isinstance(value, np.ndarray) for value in found.values()
    ):
        raise ValueError(f"{path}: not readable as tensors (holds something else)")
    return found


class _Unpickler(pickle.Unpickler):
    """Builds arrays where torch's pickle says tensors, and refuses every other global."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == (
            "collections",
            "OrderedDict",
        ):  # of hooks, which a saved tensor does not have
            return dict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"{kind} is not allowed")
        return np.frombuffer(
            self.archive.read(f"{self.folder}data/{key}"), np.dtype(dtype).newbyteorder("<")
        )


def _rebuild(
    storage: np.ndarray, offset: int, size: tuple[int], stride: tuple[int], *_: Any
) -> np.ndarray:
    (length,), (step,) = size, stride
    found = storage[offset::step][:length]
    if len(found) != length:
        raise ValueError("a tensor reaches beyond its storage")
    return found
