"""A small model with awkward sizes, batches that any number of ranks can share, and runs that save, load and hash."""

import gc
import json
from pathlib import Path

import torch

from llm.checkpoint.slices import SliceReader, state_hash, write_slices
from llm.config import RunConfig, check_config
from llm.data.stream import Batch, deal
from llm.dist import World
from llm.engine import Engine, Update, build_engine
from llm.model.init import init_weights
from llm.model.transformer import Transformer

ROWS, ACCUMULATION, SEQ_LEN, VOCAB = 4, 2, 8, 37
ENGINES = {
    "torch": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}
OFFLOADED = {f"{name}-offload": ENGINES[name] | {"offload": True} for name in ("zero2", "zero3")}
MODEL = {  # odd sizes, so that partitions need padding and cut through parameters; tied, so that one weight has two names
    "n_layers": 2, "d_model": 20, "n_heads": 2, "d_ff": 27, "seq_len": SEQ_LEN, "vocab_size": VOCAB,
    "norm": "layernorm", "bias": True, "tie_embeddings": True,
}  # fmt: skip


def run_config(world: World, engine: dict, *, precision: str = "fp32", model: dict = MODEL, **train) -> RunConfig:
    train = {"lr": 3e-3, "batch_size": -(-ROWS // world.size), "grad_accum": ACCUMULATION, "clip_norm": 0.5} | train
    sections = {"model": model, "tokenizer": {"tokenizer_path": "none"}, "data": {"data_path": "none"}}
    return check_config(sections | {"train": train, "engine": {"precision": precision} | engine}, "the test's config")


class Spoilable(Transformer):
    """A Transformer that can give a finite loss with gradients that are not numbers."""

    spoilt = False

    def forward(self, tokens_BT, targets_BT=None, cache=None, **documents):
        loss = super().forward(tokens_BT, targets_BT, cache, **documents)
        return loss + (loss * 0).sqrt() if self.spoilt else loss


def make_engine(cfg: RunConfig, world: World, seed: int = 1) -> tuple[Engine, Spoilable]:
    gc.freeze()  # else DeepSpeed's own gc.collect() takes most of a test's time
    model = Spoilable(cfg.model)
    init_weights(model, seed)
    return build_engine(cfg, world, model), model


def step_rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of a step, whoever takes them: (ids, targets), with so many targets left out that micro-batches count differently."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (ROWS * ACCUMULATION, SEQ_LEN + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.8, len(ids))[:, None]] = -100
    return ids[:, :-1], targets


def step_batches(step: int, world: World) -> tuple[list[Batch], int]:
    """(this rank's micro-batches, counted targets of the whole step)."""
    tokens, targets = step_rows(step)
    taken = deal(0, len(tokens), world.rank, world.size, -(-ROWS // world.size), ACCUMULATION)
    batches = [Batch(tokens[rows], torch.where(torch.from_numpy(rows >= 0)[:, None], targets[rows], -100), None, rows) for rows in taken]
    return batches, int((targets != -100).sum())


def train(engine: Engine, world: World, steps: range, accept=lambda loss: True) -> list[Update]:
    updates = []
    for step in steps:
        batches, n_targets = step_batches(step, world)
        updates.append(engine.train_step(batches, n_targets, lr=3e-3 / (1 + step / 10), accept=accept))
    return updates


def losses(updates: list[Update]) -> list[str]:
    """Bit for bit."""
    return [u.loss.hex() for u in updates]


def fingerprint(engine: Engine, world: World) -> int:
    """Hash of all weights and moments, whoever holds them. Collective."""
    return world.sum_ints([state_hash(engine.local_slices())])[0]


def save(engine: Engine, world: World, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = world.gather(write_slices(folder / f"{world.rank}.safetensors", engine.local_slices()))
    record = {"files": files, "params": engine.params, "state": engine.state(), "fingerprint": fingerprint(engine, world)}
    if world.rank == 0:
        (folder / "record.json").write_text(json.dumps(record))
    world.barrier()


def load(engine: Engine, folder: Path) -> dict:
    record = json.loads((folder / "record.json").read_text())
    engine.load_slices(SliceReader(folder, record["params"], record["files"]))
    engine.load_state(record["state"])
    return record
