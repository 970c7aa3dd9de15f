"""Micro-batches that fit into memory. The rows of a step and their order stay as they are: only how they are cut changes."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from llm.batch_plan import BatchPlan, smaller_rows
from llm.config import ConfigError, RunConfig
from llm.data.stream import Batch, Stream
from llm.dist import World
from llm.engine.protocol import Engine, Update
from llm.log import UserError, log


class OutOfMemory(UserError):
    """A step did not fit, and this process cannot cut it smaller by itself."""


# what has no class of its own: torch's allocator for CPUs ("can't allocate memory"), the CUDA
# runtime and driver, Triton, NCCL ("out of memory"), cuBLAS, cuDNN and others ("..._ALLOC_FAILED")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cudaErrorMemoryAllocation|_ALLOC_FAILED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch may help, by whatever name a library reports that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def fitted(cfg: RunConfig, plan: BatchPlan, world: World, engine: Engine) -> BatchPlan:
    """The plan with the most rows a micro-batch of which every rank can take one through the model. Collective."""
    if cfg.engine.zero_stage == 3:
        raise ConfigError("train.batch_size: auto tries sizes out past DeepSpeed, on each rank by itself, which ZeRO-3 cannot. Give a number.")
    while any(world.gather(not _fits(engine, plan, cfg.data.document_mask))):
        if plan.micro_rows == 1:
            raise OutOfMemory(f"Not even one row of {plan.seq_len:,} tokens fits into memory. {_ADVICE}")
        plan = replace(plan, micro_rows=smaller_rows(plan.rank_rows, plan.micro_rows))
    if world.rank == 0:
        log.info(f"train.batch_size: auto is {plan.micro_rows} here: {plan}")
    return plan


def _fits(engine: Engine, plan: BatchPlan, document_mask: bool) -> bool:
    ids = torch.zeros(plan.micro_rows, plan.seq_len, dtype=torch.int64)
    try:
        engine.try_out(Batch(ids, ids, ids if document_mask else None, None))  # of one document
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        return True
    torch.cuda.empty_cache()  # after the error is gone, which held the tensors
    return fits


def train_step(engine: Engine, stream: Stream, world: World, drawn: int, batches: list[Batch], *step: int | float | Callable) -> Update:
    """engine.train_step. If it runs out of memory alone, it is taken again in micro-batches of half as many rows, as are all that follow."""
    while True:
        try:
            return engine.train_step(batches, *step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows, message = stream.rows, str(error).partition("\n")[0]
        if rows == 1 or world.size > 1 or not engine.drop_gradients():
            raise OutOfMemory(f"Rank {world.rank} ran out of memory with {rows} rows a micro-batch ({message}). {_ADVICE}")
        torch.cuda.empty_cache()  # cuBLAS, cuDNN and Triton cannot use what torch's allocator keeps
        stream.rows = smaller_rows(stream.batch_rows, rows)
        log.warning(f"Out of memory with {rows} rows a micro-batch: {stream.rows} from here on, with the same global batch. {_ADVICE}")
        batches = stream.step(drawn)


_ADVICE = (
    "A smaller train.batch_size, a higher engine.activation_checkpointing (the share of blocks, up to 1) or engine.zero_stage take less memory; the "
    "data and their order stay the same."
)
