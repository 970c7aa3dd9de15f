"""Whether the data come faster than the model can take them."""

import time

import torch

from llm.batch_plan import batch_plan
from llm.config import RunConfig
from llm.data.ledger import Ledger
from llm.data.sampler import Sampler
from llm.data.stream import Stream
from llm.dist import World
from llm.doctor.line import FAIL, OK, WARN, Line
from llm.engine.precision import measure_rates
from llm.model.flops import flops_per_token
from llm.tokenizer import load_tokenizer
from llm.train.datasets import open_shards, pool
from llm.train.phases import Wish, choose_phase

SECONDS, ROUNDS = 1.0, 10


def loader(cfg: RunConfig | None, device: str, precision: str) -> Line:
    """Tokens a second of one rank's batches, beside what the device could take if it did nothing but matmuls. Raises UserError."""
    if cfg is None:
        return Line("loader", OK, "not looked at: --config says which data and which model")
    tokenizer = load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type)
    model = cfg.model.with_vocab(tokenizer.vocab_size)
    shards, _ = open_shards(cfg, tokenizer, World())
    plan = batch_plan(cfg, 1)
    phase = choose_phase(Ledger(), shards, Wish(), cfg.model_copy(update={"model": model}), 0, plan.global_rows).open_phase
    made = _tokens_per_s(Stream(Sampler(phase, pool(shards)), plan.global_rows, 0, 1, plan.micro_rows), phase.total, plan.global_rows)
    cores = torch.get_num_threads() if device == "cpu" else 1
    needed = cores * getattr(measure_rates(device), precision) / flops_per_token(model)
    status = OK if made > 2 * needed else WARN if made > needed else FAIL
    advice = "The model would wait for data: put the shards on a faster disk, or into memory."
    return Line("loader", status, f"{made:,.0f} tokens/s from {len(pool(shards))} shards; the model takes {needed:,.0f} at the very most", advice)


def _tokens_per_s(stream: Stream, draws: int, batch_rows: int) -> float:
    """The best of some rounds, as of the matmuls: others may use the machine meanwhile."""
    g, rates = 0, []
    for _ in range(ROUNDS):
        tokens, started_at = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started_at) < SECONDS / ROUNDS:
            tokens += sum(batch.targets_BT.numel() for batch in stream.step(g))
            g = g + batch_rows if g + 2 * batch_rows <= draws else 0
        rates.append(tokens / seconds)
    stream.close()
    return max(rates)
