"""Arrays in files that are written piece by piece and read memory-mapped, and documents in such files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt

from fastattn.cache import write_atomically
from fastattn.data.corpora import DataError

META = "arrays.json"  # written last: a folder without it is incomplete
Item = TypeVar("Item")


class Items(Sequence[Item]):
    """A sequence whose items are made where they are used; a subclass has `__len__` and makes each item."""

    def item(self, number: int) -> Item:
        """The item of a number from 0 to len - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, needs {-len(self)} to {len(self) - 1}")
        return self.item(index % len(self))

    def __iter__(self) -> Iterator[Item]:
        return (self.item(number) for number in range(len(self)))


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file; an error of writing has its number, which it has not from np.save."""
    held = io.BytesIO()
    np.lib.format.write_array(held, array, allow_pickle=False)
    path.write_bytes(held.getbuffer())


class ArrayWriter:
    """Arrays that grow by pieces, each a file NAME.bin of a folder; a context that ends with all of them complete.

    Args:
        folder: is created.
        dtypes: name -> dtype.
    """

    def __init__(self, folder: Path, dtypes: dict[str, Any]) -> None:
        self.folder = folder
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self.sizes = dict.fromkeys(dtypes, 0)
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ArrayWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / META).unlink(missing_ok=True)
        for name in self.dtypes:
            self._files[name] = self._stack.enter_context((self.folder / f"{name}.bin").open("wb"))
        return self

    def append(self, **pieces: Any) -> None:
        """Add values to the end of arrays."""
        for name, values in pieces.items():
            piece = np.ascontiguousarray(values, self.dtypes[name])
            self._files[name].write(piece.data)
            self.sizes[name] += piece.size

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._stack.close()
        if kind is None:
            about = {name: [dtype.name, self.sizes[name]] for name, dtype in self.dtypes.items()}
            write_atomically(self.folder / META, json.dumps(about) + "\n")


def load_arrays(folder: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays that an `ArrayWriter` left, memory-mapped.

    Raises:
        DataError: one is missing, or has another size than it was written with.
    """
    try:
        about = json.loads((folder / META).read_text(encoding="utf-8"))
        found: dict[str, npt.NDArray[Any]] = {}
        for name in names:
            kind, size = about[name]
            path = folder / f"{name}.bin"
            wanted = int(size) * np.dtype(kind).itemsize
            if path.stat().st_size != wanted:
                raise ValueError(f"{path.name} holds {path.stat().st_size} bytes, needs {wanted}")
            # an empty file cannot be mapped
            found[name] = np.asarray(np.memmap(path, dtype=kind, mode="r")) if size else np.empty(0, kind)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: holds no complete arrays ({error})") from None
    return found


class StoredTexts(Items[str]):
    """Texts in the files of a folder, each read where it is used, and not mapped: to go through all of them would
    make each page of the file a part of the process's resident memory."""

    def __init__(self, folder: Path) -> None:
        arrays = load_arrays(folder, ("text", "ends"))
        self._path, self._ends = folder / "text.bin", arrays["ends"]
        if len(self._ends) and int(self._ends[-1]) != len(arrays["text"]):
            raise DataError(f"{folder}: its texts end at byte {self._ends[-1]}, not at {len(arrays['text'])}")

    @staticmethod
    def write(folder: Path, texts: Iterable[str]) -> None:
        """Write texts, one after another."""
        with ArrayWriter(folder, {"text": np.uint8, "ends": np.int64}) as arrays:
            for text in texts:
                arrays.append(text=np.frombuffer(text.encode(), np.uint8))
                arrays.append(ends=[arrays.sizes["text"]])

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, number: int) -> str:
        """A text, read from the file."""
        with self._path.open("rb") as file:
            return self._read(file, number)

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)

    def _read(self, file: BinaryIO, index: int) -> str:
        first = int(self._ends[index - 1]) if index else 0
        file.seek(first)
        return file.read(int(self._ends[index]) - first).decode()
