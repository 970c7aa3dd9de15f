"""Training state as 1-D slices of named parameters: one safetensors file a rank, read back for any cut.

A parameter is three flat fp32 tensors (weight and two Adam moments). Whoever owns elements [start, start + n) of one, under whatever
engine, stage and number of ranks, writes that slice; whoever needs other bounds reads across slices.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm.checkpoint.direct import write_checked
from llm.checkpoint.errors import CheckpointError, Gone, is_gone
from llm.checkpoint.plain_files import open_file

if TYPE_CHECKING:
    import torch

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
COPY_ELEMENTS = 1 << 22  # bounds the extra memory of hashing a big slice


class NotFinite(ValueError):
    """A state with a NaN or an infinity: worth nothing, and must not push a good one out."""


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + len(values)) of the flattened parameter `name`; values are 1-D fp32 on any device."""

    name: str
    kind: str
    start: int
    values: "torch.Tensor"

    @property
    def key(self) -> str:
        return f"{self.name}/{self.kind}/{self.start}"


def check_finite(slices: Iterable[Slice]) -> None:
    """Raises NotFinite that names the first slice with a NaN or an infinity."""
    for s in slices:
        if s.values.numel() and not all(bound.isfinite() for bound in s.values.aminmax()):  # thirty times as fast as isfinite().all()
            raise NotFinite(f"{s.name}/{s.kind} holds values that are not finite")


def write_slices(path: Path, slices: Iterable[Slice]) -> dict:
    """Write one safetensors file, fsync it and check what the disk holds; returns its manifest record {path, bytes, sha256, chunks}.

    Raises OSError. Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, raw bytes). Written by hand because
    the library wants everything in host memory at once and does not hash.
    """
    import torch

    slices = [s for s in slices if s.values.numel()]
    header, offset = {"__metadata__": {"format": "tally-slices/1"}}, 0
    for s in slices:
        nbytes = 4 * s.values.numel()
        header[s.key] = {"dtype": "F32", "shape": [s.values.numel()], "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data must start at a multiple of eight; so the whole file is a row of four-byte values
    start = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.float32)
    size, sha256 = write_checked(path, [start, *(s.values for s in slices)])
    chunks = [{"name": s.name, "kind": s.kind, "start": s.start, "numel": s.values.numel()} for s in slices]
    return {"path": path.name, "bytes": size, "sha256": sha256, "chunks": chunks}


def coverage_gaps(params: list[tuple[str, int]], files: list[dict], kinds: tuple[str, ...] = KINDS) -> list[str]:
    """What is not covered exactly once, in words. `params`: (name, element count); `files`: manifest records."""
    intervals = _intervals(files)
    problems = []
    for name, numel in params:
        for kind in kinds:
            reached = 0
            for start, n, _ in intervals.pop((name, kind), []):
                if start != reached:
                    problems.append(f"{name}/{kind}: {'gap' if start > reached else 'overlap'} at element {min(start, reached):,}")
                reached = max(reached, start + n)
            if reached != numel:
                problems.append(f"{name}/{kind}: covered to element {reached:,} of {numel:,}")
    return problems + [f"{name}/{kind}: no such parameter" for name, kind in intervals]


def _intervals(files: list[dict]) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
    found = defaultdict(list)
    for file in files:
        for chunk in file.get("chunks", []):
            found[chunk["name"], chunk["kind"]].append((chunk["start"], chunk["numel"], file["path"]))
    return {key: sorted(spans) for key, spans in found.items()}


class SliceReader:
    """Reads any range of any parameter from a committed checkpoint folder."""

    def __init__(self, folder: Path, params: list[tuple[str, tuple[int, ...]]], files: list[dict]):
        self.folder, self.shapes = folder, dict(params)
        self._intervals, self._open = _intervals(files), {}

    def read(self, name: str, kind: str, start: int, numel: int) -> "torch.Tensor":
        """Elements [start, start + numel), 1-D fp32 on the CPU."""
        import torch

        spans = self._intervals.get((name, kind))
        if spans is None:
            raise CheckpointError(f"{self.folder}: holds no {kind} of parameter '{name}'; it was saved from another model, or thinned.")
        pieces, at = [], start
        first = max(0, bisect_right(spans, start, key=lambda s: s[0]) - 1)
        for begin, n, path in spans[first:]:
            if at >= start + numel:
                break
            stop = min(begin + n, start + numel)
            pieces.append(self._tensor(path, f"{name}/{kind}/{begin}", at - begin, stop - begin))
            at = stop
        if at < start + numel:
            raise CheckpointError(
                f"{self.folder}: {name}/{kind} ends at element {at:,}, {start + numel:,} are wanted; it was saved from another model."
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def read_full(self, name: str, kind: str = "fp32") -> "torch.Tensor":
        """The whole parameter in its shape."""
        shape = self.shapes.get(name, ())
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _tensor(self, path: str, key: str, begin: int, stop: int) -> "torch.Tensor":
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            if path not in self._open:
                self._open[path] = safe_open(self.folder / path, framework="pt")
            values = self._open[path].get_slice(key)[begin:stop]
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / path}: is not as the manifest says ({error}).") from None
        except OSError as error:
            if is_gone(self.folder):
                raise Gone(self.folder) from None
            with open_file(self.folder, path):  # safetensors keeps the errno to itself
                raise CheckpointError(f"{self.folder / path}: cannot be read ({error}).") from None
        if values.dtype != torch.float32 or values.shape != (stop - begin,):
            got = f"{tuple(values.shape)} of {values.dtype}"
            raise CheckpointError(f"{self.folder / path}: '{key}' has {got} where the manifest has {stop - begin:,} values of fp32.")
        return values


def state_hash(slices: Iterable[Slice]) -> int:
    """A signed 64-bit sum over elements of a mix of (parameter, kind, index, bits): add the ranks' sums, wrapping, for the state's hash.

    A sum does not care who held which element, so it is the same for every engine, stage and world size. One round of splitmix64's mixing
    is enough to tell values, places and names apart; against those who mean ill there are the files' hashes.
    """
    total = 0
    for s in slices:
        name = int.from_bytes(hashlib.sha256(f"{s.name}/{s.kind}".encode()).digest()[:8], "little", signed=True)
        for begin in range(0, s.values.numel(), COPY_ELEMENTS):
            total += _mixed_sum(s.values[begin : begin + COPY_ELEMENTS], s.start + begin, name)
    return wrap(total)


def wrap(number: int) -> int:
    """As a signed 64-bit integer, the way sums over ranks wrap."""
    return (number + 2**63) % 2**64 - 2**63


_MASK = (1 << 64) - 1
_WEYL, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def _mixed_sum(values: "torch.Tensor", start: int, name: int) -> int:
    values = values.detach().float().contiguous()
    return _mixed_sum_cpu(values.numpy(), start, name) if values.device.type == "cpu" else _mixed_sum_gpu(values, start, name)


def _mixed_sum_gpu(values: "torch.Tensor", start: int, name: int) -> int:
    import torch

    bits = values.view(torch.int32).to(torch.int64)
    z = torch.arange(start, start + bits.numel(), dtype=torch.int64, device=bits.device)
    z = (z * _signed(_WEYL) + name) ^ bits
    z = z * _signed(_MIX)
    return int((z ^ (z >> 32 & (1 << 32) - 1)).sum().item())


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _mixed_sum_cpu(values: np.ndarray, start: int, name: int) -> int:
    """The same in blocks that stay in a core's cache and without new arrays: some thirty times as fast."""
    block = 1 << 14
    bits = values.view(np.int32)
    ramp = np.arange(min(block, len(bits)), dtype=np.uint64) * np.uint64(_WEYL)
    z, shifted, total = np.empty_like(ramp), np.empty_like(ramp), 0
    for begin in range(0, len(bits), block):
        n = min(block, len(bits) - begin)
        a, b = z[:n], shifted[:n]
        np.add(ramp[:n], np.uint64(((start + begin) * _WEYL + name) & _MASK), out=a)
        np.copyto(b.view(np.int64), bits[begin : begin + n])  # keeps the sign, as the other does
        np.bitwise_xor(a, b, out=a)
        np.multiply(a, np.uint64(_MIX), out=a)
        np.right_shift(a, np.uint64(32), out=b)
        np.bitwise_xor(a, b, out=a)
        total += int(a.sum(dtype=np.uint64))
    return total
