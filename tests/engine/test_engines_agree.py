"""Promises 3, 4 and 8: ZeRO changes nothing but memory, a stopped run goes on bit for bit, and any engine reads what any other wrote."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from engine_cases import ENGINES, MODEL, OFFLOADED, fingerprint, load, losses, make_engine, run_config, save, step_batches, train
from ranks import run_ranks

from llm.checkpoint.slices import coverage_gaps

STEPS, STOP_AT = 20, 8
CASES = [(name, "fp32") for name in ENGINES | OFFLOADED] + [(name, "bf16") for name in ENGINES]
SIZES = (1, 2)


def survey(world, folder: str) -> dict:
    """What each engine does: a run that never stops, one that stops after STOP_AT steps and goes on, and reading what others saved."""
    found = {}
    for name, precision in CASES:
        cfg = run_config(world, (ENGINES | OFFLOADED)[name], precision=precision)
        home = Path(folder, f"{name}-{precision}-{world.size}")
        whole, _ = make_engine(cfg, world)
        updates = train(whole, world, range(STOP_AT))
        save(whole, world, home)
        updates += train(whole, world, range(STOP_AT, STEPS))

        again, _ = make_engine(cfg, world, seed=2)
        train(again, world, range(3))  # a used engine has more that must be replaced than a fresh one
        record = load(again, home)
        loaded, resumed = fingerprint(again, world), []
        for step in range(STOP_AT, STEPS):
            again.evaluate(step_batches(step, world)[0][0])  # must leave no trace
            resumed += train(again, world, range(step, step + 1))
        found[f"{name}-{precision}"] = {
            "losses": [u.loss for u in updates],
            "norms": [u.grad_norm for u in updates],
            "whole": [losses(updates)[STOP_AT:], whole.state(), fingerprint(whole, world)],
            "resumed": [losses(resumed), again.state(), fingerprint(again, world)],
            "saved": record["fingerprint"],
            "loaded": loaded,
            "gaps": coverage_gaps([(n, math.prod(shape)) for n, shape in record["params"]], record["files"]),
            "evaluated": world.gather(again.evaluate(step_batches(99, world)[0][0])),
        }
    found["read"] = read_all(world, folder)
    return found


def read_all(world, folder: str) -> list[tuple[str, str, int, int]]:
    """(reader, who wrote, hash when saved, hash after loading), for every engine here and every fp32 state in `folder`."""
    found = []
    for name, kind in (ENGINES | OFFLOADED).items():
        engine, _ = make_engine(run_config(world, kind), world)
        for home in sorted(Path(folder).glob("*-fp32-*")):
            record = load(engine, home)
            found.append((name, home.name, record["fingerprint"], fingerprint(engine, world)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("survey")


@pytest.fixture(scope="module")
def found(folder) -> dict[int, dict]:
    """The survey, by number of ranks."""
    by_rank = {size: run_ranks(survey, size, folder, str(folder)) for size in SIZES}
    assert by_rank[2][0] == by_rank[2][1]
    return {size: ranks[0] for size, ranks in by_rank.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_zero_changes_nothing_but_memory(found, size, precision, tolerance):
    reference = found[1][f"torch-{precision}"]
    assert reference["losses"][-1] < reference["losses"][0]
    for name in (name for name, p in CASES if p == precision):
        case = found[size][f"{name}-{precision}"]
        assert case["losses"] == pytest.approx(reference["losses"], abs=tolerance), name
        assert case["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance), name


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_evaluation_gives_each_ranks_own_sum_and_count(found, precision, tolerance):
    reference = found[1][f"torch-{precision}"]["evaluated"]
    for name in (name for name, p in CASES if p == precision):
        for size in SIZES:
            pairs = found[size][f"{name}-{precision}"]["evaluated"]
            assert sum(n for _, n in pairs) == sum(n for _, n in reference)  # together, the ranks have the same rows
            assert sum(loss for loss, _ in pairs) == pytest.approx(sum(loss for loss, _ in reference), rel=tolerance), (name, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, precision", CASES)
def test_resume_is_bitwise_the_run_that_never_stopped(found, size, name, precision):
    case = found[size][f"{name}-{precision}"]
    assert case["resumed"] == case["whole"]
    assert case["whole"][1] == {"optimizer_step": STEPS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, precision", CASES)
def test_slices_of_all_ranks_tile_every_parameter_once(found, size, name, precision):
    case = found[size][f"{name}-{precision}"]
    assert case["gaps"] == []
    assert case["loaded"] == case["saved"]


def test_every_engine_reads_what_every_other_wrote(found, folder, tmp_path):
    by_one_rank = run_ranks(read_all, 1, tmp_path, str(folder))[0]
    by_two_ranks = found[2]["read"]
    assert len(by_one_rank) == len(by_two_ranks) == len(ENGINES | OFFLOADED) * 2 * len(ENGINES | OFFLOADED)
    for reader, writer, saved, loaded in by_one_rank + by_two_ranks:
        assert loaded == saved, f"{reader} misread {writer}"


TORCH_ALONE = """
import sys
sys.path[:0] = {path!r}
from engine_cases import ENGINES, make_engine, run_config, train
from llm.dist import World
engine, _ = make_engine(run_config(World(), ENGINES["torch"]), World())
train(engine, World(), range(1))
sys.exit("deepspeed" in sys.modules)
"""


def test_deepspeed_is_not_imported_for_plain_torch():
    subprocess.run([sys.executable, "-c", TORCH_ALONE.format(path=sys.path)], check=True, timeout=60)


def stop_and_go_on(world, folder: str) -> list:
    """The last losses and the hash of a DDP run that never stopped, and of one that did."""
    model = MODEL | {"d_model": 192, "d_ff": 512}  # enough for several of DDP's buckets
    cfg = run_config(world, ENGINES["torch"], model=model)
    whole, _ = make_engine(cfg, world)
    train(whole, world, range(2))
    save(whole, world, Path(folder))
    again, _ = make_engine(cfg, world, seed=2)
    load(again, Path(folder))
    return [[losses(train(engine, world, range(2, 5))), fingerprint(engine, world)] for engine in (whole, again)]


def test_ddp_resumes_bitwise_on_three_ranks_where_the_order_of_sums_counts(tmp_path):
    whole, again = run_ranks(stop_and_go_on, 3, tmp_path, str(tmp_path / "saved"))[0]
    assert again == whole
