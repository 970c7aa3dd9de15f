"""The weights of a model as the files of a checkpoint without moments."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llm.checkpoint.slices import Slice, state_hash, wrap, write_slices

if TYPE_CHECKING:
    import torch

FILE_ELEMENTS = 1 << 26  # in one file, and so in host memory while it is written: 256 MiB
Shapes = list[tuple[str, tuple[int, ...]]]


class Reader(Protocol):
    def read(self, name: str, kind: str, start: int, numel: int) -> "torch.Tensor":
        """Elements [start, start + numel) of a flattened parameter, 1-D fp32 on the CPU."""


def write_weights(folder: Path, shapes: Shapes, reader: Reader) -> tuple[list[dict], int]:
    """Write shard-....safetensors files; returns their manifest records and the state hash. Raises OSError."""
    records, state, groups = [], 0, _groups(shapes)
    for i, ranges in enumerate(groups):
        slices = [Slice(name, "fp32", start, reader.read(name, "fp32", start, numel)) for name, start, numel in ranges]
        records.append(write_slices(folder / f"shard-{i:05d}-of-{len(groups):05d}.safetensors", slices))
        state = wrap(state + state_hash(slices))
    return records, state


def _groups(shapes: Shapes) -> list[list[tuple[str, int, int]]]:
    """Ranges (parameter, start, elements) for each file."""
    groups, room = [[]], FILE_ELEMENTS
    for name, shape in shapes:
        numel = math.prod(shape)
        for start in range(0, numel, FILE_ELEMENTS):
            n = min(FILE_ELEMENTS, numel - start)
            if n > room:
                groups.append([])
                room = FILE_ELEMENTS
            groups[-1].append((name, start, n))
            room -= n
    return groups
