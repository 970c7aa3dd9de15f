"""Validation loss and bits per byte over held-out shards."""

import math
from collections.abc import Callable, Iterable

import numpy as np

from llm.config import RunConfig
from llm.data.record import sha256_of
from llm.data.shards import Shard
from llm.data.stream import Batch
from llm.dist import World
from llm.engine.protocol import Engine
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer
from llm.train.phases import row_cut


def summed(world: World, values: list[float]) -> list[float]:
    """Each value's sum over ranks, added in order of rank: the same bits on all of them. Collective."""
    return [sum(of_ranks) for of_ranks in zip(*world.gather(values), strict=True)]


def token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes that each id stands for, int64[vocab_size]; special and padding ids stand for none."""
    special = set(tokenizer.special_ids.values())
    lengths = [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    return np.array(lengths + [0] * (vocab_size - len(lengths)), dtype=np.int64)


def measure_digest(shards: list[Shard], cfg: RunConfig) -> str:
    """Of what a validation loss is measured on: which text, how many rows, and how they are cut.

    Losses of one digest can be compared. Empty without shards.
    """
    if not shards:
        return ""
    ids = sorted(shard.meta.shard_id for shard in shards)
    rows = {"rows": cfg.train.eval_rows, "seq_len": cfg.model.seq_len}
    return sha256_of("validation", {"shards": ids} | rows | row_cut(cfg))


def reading_copy(cfg: RunConfig, engine: Engine, device: str) -> Transformer:
    """A plain model with the engine's weights of this moment, to be read in the run's precision and dropped. Collective.

    It takes no memory of its own but under ZeRO-3, where every rank holds the whole of it.
    """
    model = Transformer(cfg.model)  # on the CPU, where weights that nobody fills take no room
    parameters = dict(model.named_parameters())
    for name, whole in engine.whole_weights():
        parameters[name].data = whole
    return model.to(device).eval()


def validate(engine: Engine, batches: Callable[[], Iterable[Batch]], byte_lengths: np.ndarray, world: World) -> dict[str, float]:
    """Mean loss per counted token (nats), and bits per byte = total nats / ln 2 / bytes of the counted tokens. Collective."""

    def rank_sums() -> list[float]:
        rank_nats, rank_targets, rank_bytes = 0.0, 0, 0
        for batch in batches():
            loss_sum, n_targets = engine.evaluate(batch)
            targets = batch.targets_BT.numpy()
            rank_nats, rank_targets = rank_nats + loss_sum, rank_targets + n_targets
            rank_bytes += int(byte_lengths[targets[targets >= 0]].sum())
        return [rank_nats, rank_targets, rank_bytes]

    nats, n_targets, n_bytes = summed(world, world.together(rank_sums))
    return {"loss": nats / max(1, n_targets), "bits_per_byte": nats / math.log(2) / max(1, n_bytes)}
