"""Page-locked memory for asynchronous saves, with a stand-in for CUDA's driver."""

import pytest
import torch
from test_save_and_resume import add_tokenizer, manifest_of, names, state_of

from llm.checkpoint import rng, staging
from llm.checkpoint.manifest import read_manifest
from llm.checkpoint.saver import Save, SaveFailed
from llm.checkpoint.slices import Slice, state_hash
from llm.checkpoint.staging import Staging
from llm.dist import World

ALREADY_REGISTERED, INVALID_VALUE = 712, 1


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU. A copy that the driver loses changes nothing."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and DRIVER[0].loses and kwargs["non_blocking"]:
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


class Driver:
    """cudart's page-locking, and the error that it leaves behind for the next kernel."""

    def __init__(self):
        self.registered: dict[int, int] = {}
        self.error, self.unregister_error, self.pending, self.loses = 0, 0, 0, False

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        overlaps = any(
            other < start + size and start < other + n for other, n in self.registered.items()
        )
        self.pending = self.error or (ALREADY_REGISTERED if overlaps else 0)
        if not self.pending:
            self.registered[start] = size
        return self.pending

    def cudaHostUnregister(self, start: int) -> int:
        if not self.unregister_error:
            del self.registered[start]
        return self.unregister_error

    def kernel(self, *_, **__) -> None:
        error, self.pending = self.pending, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")


DRIVER = [Driver()]


@pytest.fixture
def driver(monkeypatch):
    DRIVER[0] = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: DRIVER[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: DRIVER[0].kernel())
    monkeypatch.setattr(staging, "_STILL_LOCKED", [])
    return DRIVER[0]


def on_gpu(n: int, first: float = 1.0) -> list[Slice]:
    return [
        Slice(
            f"p{i}", "fp32", 0, torch.arange(first + i * n, first + (i + 1) * n).as_subclass(OnGpu)
        )
        for i in range(3)
    ]


def test_what_is_page_locked_is_given_back_before_its_memory_is(driver):
    keep = Staging()
    for slices, do in (
        (on_gpu(100), bool),
        (on_gpu(100), bool),
        (on_gpu(5000), keep.give_up),
        (on_gpu(100), bool),
        (on_gpu(7000), keep.close),
    ):
        copies = keep.copy(slices)
        assert all(torch.equal(a.values, b.values) for a, b in zip(copies, slices, strict=True))
        keep.check(state_hash(copies))
        assert list(driver.registered.items()) == [(keep._buffer.data_ptr(), keep._buffer.nbytes)]
        do()
    assert driver.registered == {}


@pytest.mark.parametrize("error", [INVALID_VALUE, ALREADY_REGISTERED, 2])
def test_without_page_locking_copies_wait_and_the_next_kernel_runs(driver, error, capsys):
    driver.error, driver.loses = error, True  # every copy that is only queued would be lost
    keep, slices = Staging(), on_gpu(100)
    for _ in range(2):
        copies = keep.copy(slices)
        keep.check(state_hash(copies))
        assert all(torch.equal(a.values, b.values) for a, b in zip(copies, slices, strict=True))
    driver.kernel()  # no error was left behind
    assert f"CUDA error {error}" in capsys.readouterr().out
    keep.close()
    assert driver.registered == {}


def test_memory_that_the_driver_does_not_give_back_is_never_freed(driver):
    keep, driver.unregister_error = Staging(), INVALID_VALUE
    keep.copy(on_gpu(5000))
    address = keep._buffer.data_ptr()
    keep.give_up()
    assert [buffer.data_ptr() for buffer in staging._STILL_LOCKED] == [address]
    keep.copy(on_gpu(5000))
    assert keep._buffer.data_ptr() != address and keep._is_locked


def save_on_gpu(run, step: int, keep: Staging) -> Save:
    slices = [
        Slice(s.name, s.kind, s.start, s.values.as_subclass(OnGpu)) for s in state_of(step, World())
    ]
    saving = Save(World(), run, manifest_of(step, World()), slices, add_tokenizer, staging=keep)
    saving.start()
    return saving


def test_a_copy_that_is_not_what_the_gpu_held_is_not_published_and_the_next_is_made_another_way(
    tmp_path, driver
):
    keep = Staging()
    save_on_gpu(tmp_path, 1, keep).commit()
    driver.loses = True
    with pytest.raises(SaveFailed, match="is not what the GPU held"):
        save_on_gpu(tmp_path, 2, keep).commit()
    path = save_on_gpu(tmp_path, 3, keep).commit()
    assert driver.registered == {} and read_manifest(path).state_hash == state_hash(
        state_of(3, World())
    )
    assert names(tmp_path) == {"RUN.json", "step-000000001-a1", "step-000000003-a1"}


# ------------------------------------------------------------------ generators


def broken_gpu(*_) -> None:
    raise RuntimeError("CUDA error: out of memory")


def test_a_run_on_the_cpu_does_not_ask_a_gpu_for_its_generator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_initialized", lambda: True
    )  # as where several ranks have met
    monkeypatch.setattr(torch.cuda, "get_rng_state", broken_gpu)
    assert sorted(rng.rng_state()) == ["numpy", "python", "torch"]
    assert sorted(rng.rng_state("mps")) == ["numpy", "python", "torch"]
    asked = []
    monkeypatch.setattr(
        torch.cuda,
        "get_rng_state",
        lambda device: asked.append(device) or torch.zeros(16, dtype=torch.uint8),
    )
    assert sorted(rng.rng_state("cuda:1")) == ["cuda", "numpy", "python", "torch"] and asked == [
        "cuda:1"
    ]


def test_a_generator_that_cannot_be_asked_fails_this_save_by_the_vote_of_all_ranks(
    tmp_path, monkeypatch
):
    """Any other error would leave the other ranks waiting for this one's vote."""
    monkeypatch.setattr(torch.cuda, "get_rng_state", broken_gpu)
    with pytest.raises(SaveFailed, match="rank 0: RuntimeError: CUDA error: out of memory"):
        Save(
            World(device="cuda:0"),
            tmp_path,
            manifest_of(1, World()),
            state_of(1, World()),
            add_tokenizer,
        )
    assert list(tmp_path.iterdir()) == []
