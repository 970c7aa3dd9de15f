"""tools/plan_run.py as a person types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from little_run import SEQ_LEN, make_run

from llm.config import load_config
from llm.log import UserError
from llm.model.flops import count_params
from llm.plan import candidates as cut
from llm.plan import hardware, work

ROOT = Path(__file__).parent.parent.parent


def plan(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/plan_run.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def planned(tmp_path: Path, *words) -> tuple[dict, str]:
    done = plan(*words, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "plan.json").read_text()), done.stdout


def test_steps_are_those_that_training_takes_and_torch_is_not_imported(tmp_path):
    config = make_run(tmp_path)
    code = f"""
import sys
sys.argv = ["plan_run.py", "--config", {str(config)!r}, "--gpu", "cpu", "--json", {str(tmp_path / "plan.json")!r}]
sys.path.insert(0, "tools")
import plan_run
plan_run.main()
assert not {{"torch", "deepspeed", "transformers"}} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True)
    (job,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert job["steps"] == 10 and job["tokens"] == 10 * 4 * SEQ_LEN  # as tests/little_run.py says of this corpus
    assert job["passes"] == 1  # though the last step has one row only


def test_the_smaller_of_budget_and_data_ends_the_run_and_tokens_overrule_both(tmp_path):
    config = make_run(tmp_path)
    for words, steps in ((["total_step_budget=4"], 4), (["total_step_budget=40"], 10), (["total_step_budget=4", "--tokens", "6400"], 200)):
        report, screen = planned(tmp_path, "--config", config, "--gpu", "cpu", *words)
        assert report["plans"][0]["steps"] == steps and f"steps: {steps}" in screen


def test_without_data_the_budget_of_the_config_counts_and_the_screen_says_so(tmp_path):
    report, screen = planned(tmp_path, "--model", "gpt-1b", "--gpus", "8,64", "--gpu", "h100", "--hours-a-day", "4", "--price", "2.5")
    assert [job["steps"] for job in report["plans"]] == [44_700, 44_700]
    for word in ("data: none at data/web", "train.total_step_budget", "assumed: 40.0%", "model, not measured", "sittings:", "at 2.5 an hour", ">"):
        assert word in screen, word
    eight, sixty_four = report["plans"]
    assert eight["recommended"]["fits"] and sixty_four["hours"] < eight["hours"] / 5
    assert report["parameters"] == 1_172_405_760 and eight["checkpoint_bytes"] == 12 * report["parameters"]


def test_the_recommended_row_fits_and_no_other_that_fits_is_faster_than_the_model_can_tell(tmp_path):
    report, _ = planned(tmp_path, "--model", "llama-3-8b", "--gpus", 8, "--gpu", "h100")
    (job,) = report["plans"]
    fitting = [row for row in job["rows"] if row["fits"]]
    assert job["recommended"] in fitting and 0 < len(fitting) < len(job["rows"])
    assert job["recommended"]["tokens_per_s"] >= max(row["tokens_per_s"] for row in fitting) / 1.021


def test_what_does_not_fit_is_told_with_what_would(tmp_path):
    report, screen = planned(tmp_path, "--model", "llama-3-8b", "--gpus", 1, "--gpu", "4090")
    (job,) = report["plans"]
    assert job["recommended"] is None and job["hours"] is None
    assert "does not fit" in screen and job["would_fit"]
    way = next(way for way in job["would_fit"] if "--gpu 4090" in way)
    again, _ = planned(tmp_path, "--model", "llama-3-8b", *way.split(":")[0].split())
    assert again["plans"][0]["ranks"] > 1 and again["plans"][0]["recommended"]["fits"]


def test_batch_size_auto_is_planned_as_training_would_settle_it_and_said(tmp_path):
    words = ["batch_size=auto", "batch_tokens=524288"]
    _, screen = planned(tmp_path, "--model", "gpt-1b", "--gpus", 1, "--gpu", "h100", "zero_stage=0", *words)
    cfg = load_config(ROOT / "configs" / "gpt-1b.yaml", ["zero_stage=0", "precision=bf16", *words])
    found = cut.candidates(cfg, cut.cluster_of("h100", 1, 8), 0.4)
    mine = cut.as_configured(cfg, found)
    twice = next(c for c in found if (c.row, c.again) == (mine.row, mine.again) and c.plan.micro_rows == 2 * mine.plan.micro_rows)
    assert mine.fits and not twice.fits
    assert f"train.batch_size: auto would be {mine.plan.micro_rows}\n" in screen
    sharded = load_config(ROOT / "configs" / "gpt-1b.yaml", ["zero_stage=3", "precision=bf16", *words])
    assert cut.as_configured(sharded, cut.candidates(sharded, cut.cluster_of("h100", 8, 8), 0.4)) is None  # training refuses it


MISTAKES = {
    "a GPU that nobody knows": (["--model", "toy", "--gpu", "h1000"], "a100, a100-40gb, h100, h200"),
    "a number of GPUs that the batch cannot be cut for": (["--model", "gpt-1b", "--gpus", "3", "--gpu", "h100"], "256"),
    "no config": ([], "No config given"),
    "an MFU of nothing": (["--model", "toy", "--mfu", "0"], "--mfu is 0"),
    "another device than the one to measure": (["--model", "toy", "--measure", "--gpu", "b200"], "--measure makes real steps"),
    "a file that cannot be written": (["--model", "toy", "--gpu", "cpu", "--json", "/dev/null/x"], "cannot be written"),
    "no GPUs": (["--model", "toy", "--gpus", "0"], "'0' is not a number of GPUs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_and_exit_code_2(mistake):
    words, part = MISTAKES[mistake]
    done = plan(*words)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_measuring_puts_planned_beside_counted_bytes_and_plans_with_the_speed_it_found(tmp_path):
    report, screen = planned(tmp_path, "--config", make_run(tmp_path), "--measure", "--gpu", "cpu")
    counted = report["measured"]["bytes"]
    assert counted["weights"] == 4 * report["parameters"] and counted["moments"] == 8 * report["parameters"]
    assert "planned      counted" in screen and "measured here" in screen
    speed = 2 * SEQ_LEN / report["measured"]["step_seconds"]  # two micro-batches of one row
    assert report["plans"][0]["recommended"]["tokens_per_s"] == pytest.approx(speed, rel=0.05)
    assert not (tmp_path / "checkpoints").exists()


def test_disk_holds_what_retention_keeps_and_the_save_on_its_way(tmp_path):
    cfg = load_config(make_run(tmp_path), ["save_every=2", "keep_last=2", "keep_best=1", "keep_epochs=false", "keep_every=5"])
    cfg, _ = work.settle_vocabulary(cfg, work.find_data(cfg))
    job = work.work_of(cfg, work.find_data(cfg), global_rows=4)
    disk = work.disk_of(cfg, job)
    assert disk.checkpoint == 12 * count_params(cfg.model)
    assert disk.count == 7  # 2 last, 1 that a sitting stands on, 1 being written, 1 best, steps 5 and 10
    assert disk.dataset == sum(p.stat().st_size for p in (tmp_path / "data").glob("train-*") if p.suffix in (".bin", ".idx"))
    thin = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"thin": True})})
    assert work.disk_of(thin, job).checkpoints == 4 * disk.checkpoint + 3 * disk.checkpoint // 3


def test_damaged_data_are_refused_and_not_taken_for_none(tmp_path):
    cfg = load_config(make_run(tmp_path))
    next((tmp_path / "data").glob("train-00000.bin")).write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes"):
        work.find_data(cfg)


def test_a_micro_batch_of_the_config_that_is_as_fast_as_any_is_kept(tmp_path):
    cfg = load_config(ROOT / "configs" / "gpt-1b.yaml", ["precision=bf16"])
    found = cut.candidates(cfg, cut.cluster_of("h200", 8, 8), 0.4)
    mine = cut.as_configured(cfg, found)
    assert cut.fastest(found, mine) is mine
    again = load_config(ROOT / "configs" / "gpt-1b.yaml", ["precision=bf16", "activation_checkpointing=true"])  # costs a third
    found = cut.candidates(again, cut.cluster_of("h200", 8, 8), 0.4)
    slow = cut.as_configured(again, found)
    assert slow.fits and cut.fastest(found, slow) is not slow


def test_no_more_blocks_are_computed_again_than_must_be_and_each_costs_the_same_time():
    cfg = load_config(ROOT / "configs" / "llama-3-8b.yaml", ["precision=bf16"])
    cluster, n_layers = cut.cluster_of("h100", 8, 8), cfg.model.n_layers

    def with_blocks(c: cut.Candidate, blocks: int) -> cut.Candidate:
        stage, offload = c.row
        share = {"activation_checkpointing": blocks / n_layers, "zero_stage": stage, "offload": offload}
        return cut.candidate(cfg, cluster, c.mfu, c.plan.global_rows, c.plan.micro_rows, **share)

    partly = [c for c in cut.candidates(cfg, cluster, 0.4) if c.fits and 0 < c.again < n_layers]
    assert len({c.row for c in partly}) == 2  # ZeRO-2 and 3
    for c in partly:
        assert not with_blocks(c, c.again - 1).fits
        none, all_ = (with_blocks(c, blocks).time.compute for blocks in (0, n_layers))
        assert c.time.compute - none == pytest.approx((all_ - none) * c.again / n_layers)
        assert all_ == pytest.approx(none * 4 / 3, rel=0.03)  # the head is not computed again


def test_the_screen_has_one_row_a_stage_beside_the_configs(tmp_path):
    _, screen = planned(tmp_path, "--model", "llama-3-8b", "--gpus", 8, "--gpu", "h100", "batch_size=16")
    table = screen.partition("ZeRO")[2].partition("take:")[0].splitlines()[1:]
    rows = [(line[:2], *line[2:14].split()) for line in table]
    assert [(mark, stage) for mark, stage, _ in rows] == [(" c", "3"), ("  ", "0"), ("  ", "1"), ("  ", "2"), ("> ", "3")]
    assert 0 < float(rows[3][2]) < 1 == float(rows[1][2])  # ZeRO-2 fits with a part of the blocks, stage 0 not even with all


@pytest.mark.parametrize("n_layers", [1, 22, 32, 126, 200])
def test_the_share_that_is_told_means_as_many_blocks_as_were_planned(n_layers):
    cfg = load_config(ROOT / "configs" / "toy.yaml", ["precision=bf16", f"n_layers={n_layers}"])
    for blocks in range(n_layers + 1):
        share = cut.candidate(cfg, cut.cluster_of("h100", 1, 8), 0.4, 8, 1, activation_checkpointing=blocks / n_layers).share
        assert len(share) <= 5
        assert len(load_config(ROOT / "configs" / "toy.yaml", [f"activation_checkpointing={share}"]).engine.recomputed_blocks(n_layers)) == blocks


@pytest.mark.parametrize(("gpu", "flags", "precision"), [
    ("h100", "avx2", "bf16"), ("cpu", "avx2 avx512f", "fp32"), ("cpu", "avx512f avx512_bf16", "bf16"), ("cpu", "amx_bf16", "bf16"),
])  # fmt: skip
def test_auto_precision_is_planned_as_the_device_has_it_and_said(tmp_path, monkeypatch, gpu, flags, precision):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    cfg, note = hardware.resolve_precision(load_config(ROOT / "configs" / "toy.yaml"), hardware.find_device(gpu))
    assert cfg.engine.precision == precision and f"auto is {precision} on {gpu}" in note
    assert hardware.resolve_precision(cfg, hardware.find_device("cpu")) == (cfg, None)


def test_steps_that_fit_into_minutes_are_made_from_measured_ones_within_budget_and_above_the_warm_up(tmp_path):
    config = make_run(tmp_path)
    words = ["--config", config, "--quiet", "--gpu", "cpu", "--fit-minutes"]
    counts = [int(plan(*words, minutes, "total_step_budget=100000", "warmup_steps=7").stdout) for minutes in (0.0001, 1)]
    assert counts[0] == 14 < counts[1] <= 100000
    assert int(plan(*words, 60, "total_step_budget=40").stdout) == 40
    cfg = load_config(config, ["total_step_budget=1000", "eval_every=4", "eval_rows=12"])  # as much as a step, each
    assert work.steps_in(60, cfg, 4, tokens_per_s=4 * SEQ_LEN * 5) == 240
