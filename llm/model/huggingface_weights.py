"""Weights out of and into Hugging Face's safetensors files, one parameter at a time."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm.config import ModelConfig
from llm.log import UserError
from llm.model.huggingface import FAMILIES, parts
from llm.model.transformer import Transformer

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NOT_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # buffers that old files hold: masks and angles


def parameter_shapes(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's parameters, tied ones once; takes no memory."""
    with torch.device("meta"):
        return [(name, tuple(p.shape)) for name, p in Transformer(cfg).named_parameters()]


class Weights:
    """Our parameters, read from the safetensors files in a Hugging Face folder. Raises UserError for what is missing, odd or too much."""

    def __init__(self, folder: Path, cfg: ModelConfig, model_type: str):
        self.cfg, self.family, self.shapes = cfg, FAMILIES[model_type], dict(parameter_shapes(cfg))
        self._files = _tensor_files(folder)
        self._where, self._last = folder, (None, None)
        wanted = {self._stored(part.name) for name, shape in self.shapes.items() for part in parts(cfg, self.family, name, shape)}
        ignored = {"lm_head.weight"} if cfg.tie_embeddings else set()
        extra = sorted(name for name in self._files.keys() - wanted - ignored if not _NOT_WEIGHTS.search(name))
        if extra:
            raise UserError(f"{folder}: holds {extra[0]} ({len(extra)} such tensors), which a model of this config.json does not have.")

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, fp32; `kind` is fp32, as a checkpoint's reader is asked."""
        assert kind == "fp32"
        if self._last[0] != name:
            self._last = name, self._whole(name)
        return self._last[1].view(-1)[start : start + numel]

    def _whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        pieces = [self._part(*part, width=shape[1:]) for part in parts(self.cfg, self.family, name, shape)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _part(self, name: str, rows: int, transposed: bool, width: tuple[int, ...]) -> Tensor:
        stored = self._stored(name)
        try:
            with safe_open(self._files[stored], framework="pt") as file:
                tensor = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[stored]}: cannot be read ({error}).") from None
        tensor = tensor.T if transposed else tensor
        if tuple(tensor.shape) != (rows, *width) or not tensor.is_floating_point():
            raise UserError(f"{self._files[stored]}: {stored} is {tuple(tensor.shape)} of {tensor.dtype}, config.json means {(rows, *width)}.")
        return tensor.float().contiguous()

    def _stored(self, name: str) -> str:
        """The name in the files: those that were saved without a head lack the first word."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._files:
                return candidate
        raise UserError(f"{self._where}: {name} is missing. Is the download whole?")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    try:
        files = [ONE_FILE]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        elif not (folder / ONE_FILE).is_file():
            raise UserError(
                f"{folder}: holds neither {ONE_FILE} nor {INDEX}. Weights in .bin or .pt files are pickles, which can run any program when "
                f"they are opened, and are not read here: get the safetensors version."
            )
        found = {}
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"file name {name!r} leads out of the folder")
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), folder / name)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: its safetensors files cannot be read ({error}).") from None


def write_tensors(
    folder: Path, cfg: ModelConfig, model_type: str, read: Callable[[str], Tensor], dtype: torch.dtype, shard_bytes: int
) -> Iterator[str]:
    """Write safetensors files of up to `shard_bytes` each; `read` gives a parameter of ours. Yields each parameter's name when it is done."""
    shapes = parameter_shapes(cfg)
    shards = _shards([(name, math.prod(shape) * dtype.itemsize) for name, shape in shapes], shard_bytes)
    placed = {}
    for i, names in enumerate(shards):
        file = ONE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            whole = read(name).to(dtype)
            pieces = list(parts(cfg, FAMILIES[model_type], name, whole.shape))
            for part, rows in zip(pieces, whole.split([p.rows for p in pieces]), strict=True):
                tensors[part.name] = (rows.T if part.transposed else rows).contiguous()
            yield name
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder, folder / file)  # the library lets nobody but the owner read it
        (folder / file).chmod((folder / file).stat().st_mode & 0o666)
        placed |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(math.prod(shape) for _, shape in shapes) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n")


def _shards(sizes: list[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in their order, in groups of up to `most` bytes; a parameter that is larger has a file of its own."""
    groups, room = [[]], most
    for name, size in sizes:
        if size > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups
