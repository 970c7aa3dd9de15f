"""A model to generate with, from a run's checkpoint."""

from pathlib import Path

import torch

from llm.checkpoint.resume import Checkpoint, read_checkpoint
from llm.config import ModelConfig
from llm.engine.precision import DTYPES, measure_rates, warn_if_slow
from llm.log import UserError, log
from llm.model.packed import pack
from llm.model.transformer import Transformer
from llm.tokenizer import load_tokenizer
from llm.tokenizer.protocol import Tokenizer


def load_run(
    path: str | Path, step: int | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32, packed: bool = False
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The model, its tokenizer and the checkpoint that they are from.

    `path` is a run's folder, for its newest checkpoint or that of `step`, or the folder of one checkpoint. `packed`: faster on a CPU, but
    the linear maps have no parameters any more. When the run deletes the checkpoint meanwhile, the
    next newest is read.
    """
    return read_checkpoint(path, step, lambda found: _loaded(found, device, dtype, packed))


def _loaded(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, packed: bool
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    tokenizer = load_tokenizer(checkpoint.folder / "tokenizer")
    model = Transformer(ModelConfig.model_validate(checkpoint.manifest.config["model"]).with_vocab(tokenizer.vocab_size))
    for name, weight in model.named_parameters():
        value = checkpoint.reader.read_full(name)
        assert value.shape == weight.shape, (name, value.shape, weight.shape)
        weight.data = value.to(device, dtype)  # straight to its place: no second copy of the model in fp32
    model = model.to(device).eval()
    if packed:
        pack(model)
    return model, tokenizer, checkpoint


def dtype_name(dtype: torch.dtype) -> str:
    """What --dtype calls it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_device(name: str) -> str:
    """`auto`: the first GPU if there is one, else Apple's, else the CPU. Refuses a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch built without CUDA asserts
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0][:120]}). Try --device cpu.") from None
    return name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """`auto`: bf16 where this device is faster in it, else fp32. Warns of a bf16 that is slower."""
    if name == "auto":
        rates = measure_rates(device)
        log.debug(f"auto is {rates.fastest} on {device}: {rates}")
        return DTYPES[rates.fastest]
    if name == "bf16":
        warn_if_slow(name, device, "--dtype auto takes the faster one.")
    return DTYPES[name]
