import pytest
from ranks import run_ranks

from llm.dist import World, read_environment
from llm.log import UserError


def collectives(world: World) -> list:
    def fail_on_rank_1() -> None:
        if world.rank == 1:
            raise UserError("only rank 1 knows")

    try:
        world.together(fail_on_rank_1)
        verdict = "went on"
    except UserError as error:
        verdict = str(error)
    return [
        world.sum_ints([world.rank + 1, 2**62]),
        world.max_ints([world.rank, -world.rank]),
        world.gather({"rank": world.rank, "text": "é" * world.rank}),
        world.broadcast(f"from {world.rank}"),
        world.on_rank_0(lambda: world.rank),
        verdict,
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_gets_the_same_answer(tmp_path, size):
    results = run_ranks(collectives, size, tmp_path)
    assert all(result == results[0] for result in results)
    sums, largest, gathered, told, first, verdict = results[0]
    assert sums == [sum(range(1, size + 1)), (size * 2**62 + 2**63) % 2**64 - 2**63]
    assert largest == [size - 1, 0]
    assert gathered == [{"rank": r, "text": "é" * r} for r in range(size)]
    assert (told, first) == ("from 0", 0)
    assert verdict == ("only rank 1 knows" if size > 1 else "went on")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}, (5, 8, 2)),
    ],
)
def test_each_launcher_is_understood(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == place
