import json

import pytest
import torch

from llm.checkpoint.slices import KINDS, CheckpointError, Slice, SliceReader, _mixed_sum_cpu, _mixed_sum_gpu, coverage_gaps, state_hash, write_slices

PARAMS = [("wide", (5, 7)), ("bias", (3,)), ("one", (1,))]


def whole(name: str, kind: str) -> torch.Tensor:
    """Values that tell which parameter, kind and element they are."""
    base = 1000 * [n for n, _ in PARAMS].index(name) + 100_000 * KINDS.index(kind)
    return torch.arange(base, base + torch.Size(dict(PARAMS)[name]).numel(), dtype=torch.float32)


def cut(world_size: int) -> list[list[Slice]]:
    """Every parameter and moment, an even share a rank."""
    ranks = [[] for _ in range(world_size)]
    for name, _ in PARAMS:
        for kind in KINDS:
            values = whole(name, kind)
            share = -(-len(values) // world_size)
            for rank, slices in enumerate(ranks):
                slices.append(Slice(name, kind, rank * share, values[rank * share : (rank + 1) * share]))
    return ranks


def written(folder, world_size: int) -> list[dict]:
    return [write_slices(folder / f"shard-{rank}.safetensors", slices) for rank, slices in enumerate(cut(world_size))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_whatever_was_written_in_one_cut_reads_back_in_any_other(tmp_path, world_size):
    reader = SliceReader(tmp_path, PARAMS, written(tmp_path, world_size))
    for name, shape in PARAMS:
        for kind in KINDS:
            values = whole(name, kind)
            assert torch.equal(reader.read_full(name, kind), values.view(shape))
            for start in range(len(values)):
                for stop in range(start, len(values) + 1):
                    assert torch.equal(reader.read(name, kind, start, stop - start), values[start:stop])


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    write_slices(tmp_path / "x.safetensors", cut(2)[1])
    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors["wide/exp_avg/18"], whole("wide", "exp_avg")[18:])


def test_a_parameter_that_was_never_saved_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="'other'"):
        SliceReader(tmp_path, PARAMS, written(tmp_path, 1)).read("other", "fp32", 0, 1)


def test_gaps_overlaps_and_strangers_are_found(tmp_path):
    numels = [(name, torch.Size(shape).numel()) for name, shape in PARAMS]
    files = written(tmp_path, 2)
    assert coverage_gaps(numels, files) == []
    assert coverage_gaps(numels, files[:1])  # the second rank's part is missing
    assert coverage_gaps(numels, [files[0], files[0], files[1]])  # the first rank's part is there twice
    shifted = json.loads(json.dumps(files))
    shifted[1]["chunks"][0]["start"] += 1
    assert any("gap at element 18" in problem for problem in coverage_gaps(numels, shifted))
    assert any("no such parameter" in problem for problem in coverage_gaps(numels[:-1], files))


def test_the_state_hash_does_not_depend_on_who_holds_what():
    hashes = set()
    for world_size in (1, 2, 3, 40):
        total = sum(state_hash(slices) for slices in cut(world_size))
        hashes.add(total % 2**64)
    assert len(hashes) == 1


def test_the_state_hash_changes_with_a_bit_a_place_or_a_name():
    values = torch.arange(10, dtype=torch.float32)
    base = state_hash([Slice("a", "fp32", 0, values)])
    flipped = values.clone()
    flipped.view(torch.int32)[3] ^= 1
    swapped = values.clone()
    swapped[[2, 7]] = swapped[[7, 2]]
    others = [Slice("a", "fp32", 0, flipped), Slice("a", "fp32", 0, swapped), Slice("a", "fp32", 1, values), Slice("b", "fp32", 0, values)]
    assert len({base, *(state_hash([s]) for s in others)}) == 5


def test_negative_zero_and_nan_bits_survive_the_round_trip(tmp_path):
    values = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    record = write_slices(tmp_path / "x.safetensors", [Slice("w", "fp32", 0, values)])
    back = SliceReader(tmp_path, [("w", (4,))], [record]).read("w", "fp32", 0, 4)
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("start", [0, 5, 2**40])
def test_the_state_hash_on_a_cpu_is_the_one_that_other_devices_compute(start):
    values = torch.randn(40_001)  # several blocks, the last one short
    values[:3] = torch.tensor([-0.0, float("inf"), -1e-40])
    cpu, other = _mixed_sum_cpu(values.numpy(), start, -12345), _mixed_sum_gpu(values, start, -12345)
    assert (cpu - other) % 2**64 == 0
