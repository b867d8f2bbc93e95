"""Write and read a checkpoint's tensors by name and box, independent of the mesh that wrote them.

Every rank writes one file of boxes. The file's header gives each box's tensor, that tensor's full shape, and the box's
offset in it. A reader can ask for any box of a tensor. It is assembled from the files, and only the needed slices are
read. Tensors of LTE heads are named head_NN/NAME.

torch.distributed.checkpoint is not used for three reasons. Its metadata is a pickle. Its plans are sent as pickles. Its
safetensors files cannot hold two boxes of one tensor, which ZeRO's partitions need as they cut rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import make_durable, parse_json
from megatron_switchlora.distributed.slices import TensorSlice

MEND = "The file was changed or damaged: restore it, or use another checkpoint."


@dataclass(frozen=True)
class Box:
    """One stored box: its `key` in a file, its `offset` in the tensor, and its `size`."""

    file: Path
    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


def write_slices(path: Path, slices: Iterable[TensorSlice]) -> None:
    """Write slices (on the CPU) as one durable safetensors file.

    Raises:
        OSError, SafetensorError: the disk is full, or the folder is gone.
    """
    tensors, index = {}, {}
    for held in slices:
        key = f"{held.name}@{','.join(map(str, held.offset))}"
        tensors[key] = held.tensor
        index[key] = [held.name, held.shape, held.offset]
    save_durably(tensors, path, {"boxes": json.dumps(index)})


def save_durably(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write contiguous tensors as one durable safetensors file, readable by all who can read its folder.

    Raises:
        OSError, SafetensorError: the disk is full, or the folder is gone.
    """
    save_file(tensors, path, metadata=metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read the file
    make_durable(path)


def _boxes_of(file: Any, path: Path) -> Iterator[tuple[str, tuple[int, ...], Box]]:
    """Yield (tensor's name, its full shape, box) for each box in an open file.

    Raises:
        UserError: the file's index is not what `write_slices` writes.
    """
    try:
        for key, (name, shape, offset) in parse_json((file.metadata() or {}).get("boxes", "{}")).items():
            size = tuple(file.get_slice(key).get_shape())
            sides = list(zip(shape, offset, size, strict=True))
            if not isinstance(name, str) or not all(type(n) is int for side in sides for n in side):
                raise TypeError(f"of {key}")
            if not all(0 <= at <= at + long <= whole for whole, at, long in sides):
                raise ValueError(f"{key} lies outside of its tensor")
            yield name, tuple(shape), Box(path, key, tuple(offset), size)
    except (AttributeError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"The index in {path} is not valid ({error}). {MEND}") from None


class Archive:
    """Read files that `write_slices` has written.

    A file is mapped only during a read, so that its pages do not count as this process's memory.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[str, list[Box]] = {}
        for path in files:
            with self._open(path) as file:
                for name, shape, box in _boxes_of(file, path):
                    if self.shapes.setdefault(name, shape) != shape:
                        raise UserError(f"{path} and another file give {name} different shapes. {MEND}")
                    self._boxes.setdefault(name, []).append(box)

    @staticmethod
    @contextmanager
    def _open(path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}.") from None

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def names(self) -> Iterator[str]:
        """Yield the names of all tensors, in the order of the files."""
        yield from self.shapes

    def read(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Return the box [offset, offset + size) of a tensor, by default all of it, on the CPU as stored.

        Raises:
            UserError: there is no such tensor, or the files do not hold the whole box.
        """
        if name not in self.shapes:
            raise UserError(f"The checkpoint holds no tensor {name!r}: it was written by another method or model.")
        shape = self.shapes[name]
        start = tuple(offset) if offset is not None else (0,) * len(shape)
        end = tuple(a + b for a, b in zip(start, size if size is not None else shape, strict=True))
        if len(start) != len(shape) or any(b > whole for b, whole in zip(end, shape, strict=True)):
            raise UserError(f"The checkpoint's {name} has shape {list(shape)}, but the model's is larger: {list(end)}.")
        overlaps = [(box, *_overlap(box, start, end)) for box in self._boxes[name]]
        overlaps = [entry for entry in overlaps if all(a < b for a, b in zip(entry[1], entry[2], strict=True))]
        if len(overlaps) == 1 and overlaps[0][1:] == (start, end):  # the common case, without a copy
            return self._slice(*overlaps[0])
        held = sum(prod(b - a for a, b in zip(*entry[1:], strict=True)) for entry in overlaps)
        if held < prod(b - a for a, b in zip(start, end, strict=True)):  # before memory is allocated for the result
            raise _gap(name, start, end)
        pieces = [(first, last, self._slice(box, first, last)) for box, first, last in overlaps]
        whole = pieces[0][2].new_empty([b - a for a, b in zip(start, end, strict=True)])
        missing = torch.ones(whole.shape, dtype=torch.bool)
        for first, last, values in pieces:
            place = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
            whole[place] = values
            missing[place] = False
        if missing.any():
            raise _gap(name, start, end)
        return whole

    def _slice(self, box: Box, first: tuple[int, ...], last: tuple[int, ...]) -> Tensor:
        place = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, box.offset, strict=True))
        with self._open(box.file) as file:
            return file.get_slice(box.key)[place]

    def fill(self, held: TensorSlice) -> None:
        """Copy a slice's box into its memory, in its precision.

        Raises:
            UserError: as `read`; or the stored tensor has another shape.
        """
        if held.name in self and self.shapes[held.name] != held.shape:
            raise UserError(
                f"The checkpoint's {held.name} has shape {list(self.shapes[held.name])}, but the configured model's "
                f"has {list(held.shape)}: give the configuration that wrote the checkpoint."
            )
        if held.tensor.numel():
            held.tensor.copy_(self.read(held.name, held.offset, held.tensor.shape))


def _overlap(box: Box, start: tuple[int, ...], end: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = tuple(max(a, b) for a, b in zip(box.offset, start, strict=True))
    last = tuple(min(o + s, e) for o, s, e in zip(box.offset, box.size, end, strict=True))
    return first, last


def _gap(name: str, start: tuple[int, ...], end: tuple[int, ...]) -> UserError:
    return UserError(f"The checkpoint's files do not hold all of {name} [{list(start)}, {list(end)}): one is missing.")
