"""Out of memory: the run goes on in smaller micro-batches, and learns what it would have learned with them from the start."""

from itertools import count
from unittest import mock

import pytest
import torch
from little_run import SEQ_LEN, make_run, sit
from ranks import run_ranks

from llm.batch_plan import batch_plan, smaller_rows
from llm.config import ConfigError, load_config
from llm.dist import World
from llm.engine.torch_engine import TorchEngine
from llm.train.fit import OutOfMemory, fitted, is_out_of_memory


def memory_for(rows: int, error: BaseException, spared: int = 0):
    """A machine on which batches of more rows than this run out of memory after the forward pass, the first `spared` of them not."""
    whole, too_large = TorchEngine._loss, count()

    def loss(self, model, batch):
        found = whole(self, model, batch)
        if self.model.training and len(batch.tokens_BT) > rows and next(too_large) >= spared:
            found.register_hook(lambda _: (_ for _ in ()).throw(error))
        return found

    return mock.patch.object(TorchEngine, "_loss", loss)


ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "host": MemoryError,
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "torch on a cpu": lambda: RuntimeError("can't allocate memory: 8 bytes"),
    "another": lambda: RuntimeError("another"),
}


NAMES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    MemoryError(),
    *map(RuntimeError, (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN Frontend error: [cudnn_frontend] Error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
        "NCCL Error 1: unhandled cuda error (cuda error 2 'out of memory')",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: cudaErrorMemoryAllocation",
    )),
]  # fmt: skip
OTHERS = [
    ValueError("out of memory"),
    *map(RuntimeError, (
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
        "Connection closed by peer",
        "unable to open shared memory object </torch_1> in read-write mode: Too many open files",
    )),
]  # fmt: skip


def test_out_of_memory_is_known_by_every_name_and_nothing_else_is_taken_for_it():
    assert [str(error) for error in NAMES if not is_out_of_memory(error)] == []
    assert [str(error) for error in OTHERS if is_out_of_memory(error)] == []


def train(world, config: str, memory: int | None, error: str, spared: int) -> dict:
    """What a run ends with, or how it failed."""
    if memory is None:
        return sit(world, config)
    with memory_for(memory, ERRORS[error](), spared):
        try:
            return sit(world, config)
        except (OutOfMemory, RuntimeError) as failure:
            return {type(failure).__name__: str(failure)}


def run_of(root, rows, memory: int | None = None, error: str = "cuda", spared: int = 0, **changes) -> dict:
    config = str(make_run(root, batch_size=rows, **changes))
    return run_ranks(train, 1, root, config, memory, error, spared)[0]  # in a process of its own, because a run takes over the output


@pytest.mark.parametrize("error", ["cuda", "cublas", "host", "torch on a cpu"])
def test_after_running_out_of_memory_the_run_is_that_of_the_smaller_micro_batch(tmp_path, error):
    small = run_of(tmp_path / "small", 2, batch_tokens=8 * SEQ_LEN)
    # in the second micro-batch of the first step, when the first one has left its gradients
    halved = run_of(tmp_path / "halved", 4, memory=2, error=error, spared=1, batch_tokens=8 * SEQ_LEN)
    assert halved["step"] == 5
    assert (halved["chain"], halved["state"], halved["ledger"]) == (small["chain"], small["state"], small["ledger"])


def test_other_errors_and_a_single_row_too_many_end_the_run(tmp_path):
    told = run_of(tmp_path / "a", 2, memory=0)["OutOfMemory"]
    assert "with 1 rows a micro-batch" in told and "activation_checkpointing" in told
    assert run_of(tmp_path / "b", 2, memory=0, error="another") == {"RuntimeError": "another"}


def test_auto_takes_the_largest_that_fits(tmp_path):
    assert run_of(tmp_path / "auto", "auto", memory=2)["state"] == run_of(tmp_path / "two", 2)["state"]


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_size_is_tried_with_documents_where_they_are_kept_apart(tmp_path, document_mask):
    cfg, engine = load_config(make_run(tmp_path, batch_size="auto"), [f"data.document_mask={document_mask}"]), mock.Mock()
    fitted(cfg, batch_plan(cfg, 1), World(), engine)
    assert (engine.try_out.call_args.args[0].doc_ids_BT is not None) == document_mask


def auto_where_rank_1_has_less(world, config, stage) -> int:
    from llm.engine.deepspeed_engine import DeepSpeedEngine
    from llm.train import run as training

    plans, tried = [], DeepSpeedEngine.try_out

    def try_out(self, batch):
        tried(self, batch)
        if world.rank == 1 and len(batch.tokens_BT) > 1:
            raise torch.OutOfMemoryError("no")

    noted = mock.patch.object(training, "fitted", lambda *args: plans.append(fitted(*args)) or plans[0])
    with noted, memory_for(1 if world.rank else 9, torch.OutOfMemoryError("no")), mock.patch.object(DeepSpeedEngine, "try_out", try_out):
        found = sit(world, config, [f"engine.zero_stage={stage}"])
    return [plans[0].micro_rows, found["step"]]


@pytest.mark.parametrize("stage", [0, 2])
def test_all_ranks_take_what_the_poorest_can(tmp_path, stage):
    config = str(make_run(tmp_path / "run", batch_size="auto"))
    assert run_ranks(auto_where_rank_1_has_less, 2, tmp_path, config, stage) == [[1, 10]] * 2


def test_auto_is_refused_under_zero_3_on_one_rank_as_on_many(tmp_path):
    cfg, engine = load_config(make_run(tmp_path, batch_size="auto"), ["engine.zero_stage=3"]), mock.Mock()
    with pytest.raises(ConfigError, match="Give a number"):
        fitted(cfg, batch_plan(cfg, 1), World(), engine)
    assert not engine.try_out.called


def test_auto_needs_to_be_told_the_global_batch(tmp_path):
    config = make_run(tmp_path / "run", batch_size="auto", batch_tokens=None)
    with pytest.raises(ConfigError, match="auto needs train.batch_tokens"):
        batch_plan(load_config(config), 1)
    assert [smaller_rows(12, rows) for rows in (12, 6, 4, 3, 2)] == [6, 3, 2, 1, 1]
