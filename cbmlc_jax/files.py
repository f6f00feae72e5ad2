"""Files that are there whole or not at all."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable

import numpy as np


def write_atomic(path: str, content: str | bytes | Iterable[str]) -> None:
    """Writes beside `path` and renames: a reader sees the old or the new content."""
    if not isinstance(content, bytes):
        pieces = [content] if isinstance(content, str) else content
        content = (piece.encode("utf8") for piece in pieces)
    else:
        content = [content]
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_array(path: str, array: np.ndarray) -> None:
    """A .npy file, atomically; read it with np.load(path, allow_pickle=False)."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def write_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """A compressed .npz file, atomically; read it with allow_pickle=False."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def write_jsonl(path: str, rows: list[dict]) -> None:
    """One JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: str) -> list[dict]:
    """The rows of `write_jsonl`; none if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf8") as file:
        return [json.loads(line) for line in file if line.strip()]
