"""Numbers gone bad: what the guard judges by, and whole runs in which no rank moves for a loss or gradient that is worth nothing."""

import json
import math
import os
from pathlib import Path

import pytest
import spoil as spoil_module
from little_run import add_shard, make_run, sit
from ranks import run_ranks
from spoil import FAULTS, spoil
from test_ledger_tool import answer

from llm.checkpoint import folder
from llm.checkpoint.manifest import read_manifest
from llm.checkpoint.resume import damage
from llm.checkpoint.slices import SliceReader
from llm.cli import NEEDS_A_PERSON
from llm.config import load_config
from llm.train import loop
from llm.train.guard import SpikeGuard, refused_in_a_row

STAGES = [0, 1, 2, 3] if os.environ.get("TORTURE") else [0, 2]
USUAL = [2.0, 2.4] * 32


def guard(losses=(), norms=(), sigma=6.0, window=128) -> SpikeGuard:
    return SpikeGuard(sigma, window, {"losses": list(losses), "grad_norms": list(norms)})


# ------------------------------------------------------------------ what it judges by


def test_a_loss_far_above_the_last_ones_is_refused_with_value_and_limit():
    assert guard(USUAL).why_not(3.399) is None
    assert guard(USUAL).why_not(3.401) == (
        "the loss was 3.401, above 3.4 = 2.2 + 6 x 0.2, mean and standard deviation of the last 64 applied steps"
    )
    assert guard(USUAL).why_not(-9.0) is None and guard(USUAL).why_not(math.nan) == "the loss was nan"


@pytest.mark.parametrize(("steps", "window", "acts"), [(63, 128, False), (64, 128, True), (31, 32, False), (32, 32, True)])
def test_it_does_not_act_before_half_the_window_and_32_steps(steps, window, acts):
    assert bool(guard(USUAL[:steps], window=window).why_not(99.0)) == acts
    assert guard(USUAL[:steps], window=window).why_not(math.inf) == "the loss was inf"


@pytest.mark.parametrize("sigma", [None, 0.0])
def test_off_it_refuses_only_what_is_not_finite(sigma):
    assert guard(USUAL, USUAL, sigma).why_not(1e9) is None and guard(USUAL, USUAL, sigma).applied(2.0, 1e9) is None
    assert guard(USUAL, sigma=sigma).why_not(math.nan)


def test_losses_that_hardly_differ_leave_room_for_rounding_and_small_rises():
    assert guard([2.0] * 64).why_not(2.5) is None and guard([1e-6] * 64).why_not(0.5) is None
    assert guard([2.0] * 64).why_not(2.51) and guard([1e-6] * 64).why_not(0.51)


def test_a_falling_loss_is_never_refused_and_the_window_keeps_the_last_steps_alone():
    g = guard(window=64)
    for step in range(500):
        loss = 2 + 8 * math.exp(-step / 50) + 0.05 * (step % 7)
        assert g.why_not(loss) is None and g.applied(loss, 1.0) is None
    assert len(g.recent["losses"]) == 64 and g.recent["losses"][-1] == loss


def test_a_gradient_norm_that_stays_high_is_told_once_and_becomes_usual_at_last():
    g = guard(USUAL, [2.0, 2.1] * 32)
    told = [g.applied(2.0, norm) for norm in [2.0, 900.0, 900.0, 2.0, 900.0]]
    assert [bool(t) for t in told] == [False, True, False, False, True]
    assert told[1].startswith("the gradient norm was 900, above 2.3492 = ")
    assert max(g.recent["grad_norms"]) < 4  # one spike hides no other
    g = guard(USUAL, [2.0, 2.1] * 32)
    assert [step for step in range(300) if g.applied(2.0, 3.0)] == [0] and g.applied(2.0, 3.01) is None


def test_refused_steps_are_counted_on_from_the_ledger():
    assert refused_in_a_row([3, 7, 8], 8) == 2 and refused_in_a_row([3, 7, 8], 9) == 0 and refused_in_a_row([], 0) == 0


def two_phases(world, config: str) -> None:
    sit(world, config)
    data = Path(config).parent / "data"
    add_shard(data, data.parent / "tokenizer", 500, 580)
    sit(world, config, only_new=True)


def test_other_data_are_judged_by_their_own_losses_alone(tmp_path):
    config = make_run(tmp_path)
    run_ranks(two_phases, 1, tmp_path, str(config))
    first, second = (read_manifest(entry.path) for entry in folder.entries(load_config(config).run_folder))
    assert [len(m.recent[key]) for m in (first, second) for key in ("losses", "grad_norms")] == [10, 10, 3, 3]


# ------------------------------------------------------------------ whole runs on two ranks

LASTING = ["an_embedding_weight_is_inf_on_one_rank"]  # what cannot go by itself
PASSING = [name for name in FAULTS if name not in (*LASTING, "loss_times_100")]


def bad_runs(world, root: str, stage: int) -> dict:
    """Each fault in a run of its own, all in the same processes."""
    found = {}
    for name in (*PASSING, *LASTING):
        if stage and name.endswith("after_the_reduction"):
            continue
        once, often = f"{root}/{name}-1/little.json", f"{root}/{name}-9/little.json"
        settings = [f"zero_stage={stage}", "save_every=2", "async_save=false", "eval_every=0"]
        found[name] = [spoil(world, once, settings, name, [3]), spoil(world, often, settings, name, list(range(3, 99)))]
    return found


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"zero{stage}" if stage else "torch")
def bad(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"bad{request.param}")
    for name in (*PASSING, *LASTING):
        for times in (1, 9):
            make_run(root / f"{name}-{times}")
    ranks = run_ranks(bad_runs, 2, root, str(root), request.param)
    return {"root": root, "ranks": ranks, "faults": list(ranks[0])}


def test_no_rank_moves_for_a_number_that_is_not_finite_and_all_decide_alike(bad):
    for name in bad["faults"]:
        for one, other in zip(*(rank[name] for rank in bad["ranks"]), strict=True):
            assert one["applied"] == other["applied"] and not one["applied"]["3"], name
            for rank in (one, other):
                assert rank["untouched"] == {step: not applied for step, applied in rank["applied"].items()}, name


def test_the_run_goes_on_and_the_skip_is_in_log_metrics_and_ledger_with_file_and_document(bad):
    for name in (name for name in bad["faults"] if name in PASSING):
        told = bad["ranks"][0][name][0]
        assert told["step"] == 10 and [step for step, applied in told["applied"].items() if not applied] == ["3"]
        (skipped,) = told["ledger"]["phases"][0]["skipped"]
        reason = "the loss was nan" if "loss" in name else "a gradient was not finite on some rank (limit: any finite number)"
        assert skipped == {"start": 8, "stop": 12, "step": 3, "reason": reason}
        run = bad["root"] / f"{name}-1" / "checkpoints" / "little"
        assert f"step 3: {reason}" in (run / "logs" / "rank-0.log").read_text()
        records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert [(r["step"], r["fault/skipped"]) for r in records if "fault/skipped" in r] == [(3, reason)]


def test_the_third_refusal_in_a_row_stops_all_ranks_with_the_code_for_a_person(bad):
    for name in bad["faults"]:
        for rank in bad["ranks"]:
            told = rank[name][1]
            assert told["code"] == NEEDS_A_PERSON and told["error"].startswith("3 updates in a row were refused, the last at step 5: "), name
            assert max(map(int, told["applied"])) == 5


def test_nothing_that_is_not_finite_is_ever_published(bad):
    runs = [bad["root"] / f"{name}-{times}" / "checkpoints" / "little" for name in bad["faults"] for times in (1, 9)]
    checkpoints = [entry.path for run in runs for entry in folder.entries(run)]
    assert len(checkpoints) > len(runs)
    for path in checkpoints:
        manifest = read_manifest(path)
        assert damage(path, manifest) is None
        reader = SliceReader(path, manifest.shapes, [f.model_dump() for f in manifest.files])
        assert all(reader.read_full(name, kind).isfinite().all() for name, _ in manifest.shapes for kind in ("fp32", "exp_avg", "exp_avg_sq"))


# ------------------------------------------------------------------ before the rate is blamed, another kernel


def with_other_kernels(world, cases: list) -> list[dict]:
    """Runs whose numbers go bad in some steps, where cuDNN is left (True) or was not in use, each time that this is asked."""
    FAULTS["loss_is_nan"] = lambda engine, *_: spoil_module._scale_loss(engine, math.nan)
    runs = []
    for config, fault, steps, answers, settings in cases:
        left = iter(answers)
        loop.leave_cudnn = lambda cfg, device, left=left: next(left)
        told = spoil(world, config, ["eval_every=0", "async_save=false", *settings], fault, steps)
        runs.append(told | {"not_asked": len(list(left))})
    return runs


def test_three_steps_that_are_not_finite_change_the_kernel_and_three_more_end_the_run(tmp_path):
    cases = [("loss_is_nan", [3, 4, 5], [True], []), ("loss_is_nan", list(range(3, 9)), [True, False], [])]
    if os.environ.get("TORTURE"):
        cases.append(("loss_times_100", [34, 35, 36], [True], ["spike_window=32", "epochs=4"]))
    (runs,) = run_ranks(with_other_kernels, 1, tmp_path, [(str(make_run(tmp_path / str(i))), *case) for i, case in enumerate(cases)])
    passes, fails, *spikes = runs
    assert [int(step) for step, applied in passes["applied"].items() if not applied] == [3, 4, 5] and passes["step"] == 10
    assert [s["step"] for s in passes["ledger"]["phases"][0]["skipped"]] == [3, 4, 5]
    assert fails["code"] == NEEDS_A_PERSON and max(map(int, fails["applied"])) == 8
    assert [(run["code"], max(map(int, run["applied"]))) for run in spikes] == [(NEEDS_A_PERSON, 36)] * len(spikes)
    assert [run["not_asked"] for run in runs] == [0, 0, 1][: len(runs)]  # a spike is no matter of the kernel


# ------------------------------------------------------------------ a spike, and a resume


def spiking_runs(world, root: str, stage: int) -> list[dict]:
    """A loss 100 times too high in step 36: undisturbed, and in a run that dies in step 35 and goes on from step 33."""
    settings = [f"zero_stage={stage}", "save_every=33", "keep_epochs=false", "spike_window=32", "epochs=4", "async_save=false", "eval_every=0"]
    whole = spoil(world, f"{root}/whole/little.json", settings, "loss_times_100", [36])
    died = spoil(world, f"{root}/died/little.json", settings, "loss_times_100", [36], die_at=35)
    return [whole, died, spoil(world, f"{root}/died/little.json", settings, "loss_times_100", [36])]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_times_100_is_skipped_in_the_same_step_whether_or_not_the_run_died_before_it(tmp_path, stage):
    make_run(tmp_path / "whole")
    config = make_run(tmp_path / "died")
    for whole, died, resumed in run_ranks(spiking_runs, 2, tmp_path, str(tmp_path), stage):
        assert died["error"] == "died" and max(map(int, died["applied"])) == 34
        assert list(resumed["applied"])[0] == "34" and whole["step"] == 37
        assert [step for step, applied in whole["applied"].items() if not applied] == ["36"]
        assert {s: whole["applied"][s] for s in resumed["applied"]} == resumed["applied"] and whole["untouched"]["36"]
        assert (resumed["state"], resumed["chain"], resumed["ledger"]) == (whole["state"], whole["chain"], whole["ledger"])
    (skipped,) = whole["ledger"]["phases"][0]["skipped"]
    assert skipped["step"] == 36 and "above" in skipped["reason"] and "the last 32 applied steps" in skipped["reason"]
    *_, before, last = (read_manifest(entry.path) for entry in folder.entries(load_config(config).run_folder))
    assert before.step == 33 and len(before.recent["losses"]) == 32 and max(last.recent["losses"]) < 20
    told = answer("skipped", load_config(config).run_folder)
    assert f"step 36, phase p0 (data), draws 140 to 143: {skipped['reason']}" in told and told.count("draw 14") == 4
    assert "document 0" in told and "tokens" in told
