"""The DeepSpeed JSON is completed from the run's config, and contradicting it is one error."""

import json

import pytest
from engine_cases import run_config

from llm.dist import World
from llm.engine import EngineError
from llm.engine.ds_config import FOLDER, ds_config_path, leaves, load_ds_config
from llm.engine.ds_traps import traps

TWO = World(size=2)
SHIPPED = sorted(FOLDER.glob("*.json"))


def write(tmp_path, **content) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_are_completed_from_the_run(path):
    stage, offload = int(path.name[4]), "offload" in path.name
    cfg = run_config(TWO, {"zero_stage": stage, "offload": offload}, precision="bf16", clip_norm=0.7)
    assert ds_config_path(cfg.engine) == path
    config = load_ds_config(cfg, TWO, n_params=1001)
    assert "auto" not in [value for _, value in leaves(config)]
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 2, 2)
    assert config["gradient_clipping"] == 0.7
    assert config["torch_autocast"]["enabled"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1002
    assert config["zero_optimization"]["offload_optimizer"]["device"] == ("cpu" if offload else "none")
    assert "optimizer" not in config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_the_readme_says_why_for_each_key_of_each_file(path):
    readme = (FOLDER / "README.md").read_text()
    missing = [key for key, _ in leaves(json.loads(path.read_text())) if f"`{key.split('.')[-1]}`" not in readme]
    assert missing == []


def test_every_mismatch_is_told_in_one_error(tmp_path):
    path = write(
        tmp_path,
        train_micro_batch_size_per_gpu=16,
        gradient_accumulation_steps=2,
        gradient_clipping=1.0,
        bf16={"enabled": True},
        optimizer={"type": "AdamW", "params": {"lr": 0.1, "betas": "auto"}},
        scheduler={"type": "WarmupLR"},
        zero_optimization={"stage": 3, "stage3_prefetch_bucket_size": "auto"},
    )
    with pytest.raises(EngineError) as error:
        load_ds_config(run_config(TWO, {"zero_stage": 2, "ds_config": path}), TWO, n_params=10)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [line.split()[1].rstrip(":") for line in lines] == [
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.params.lr",
        "zero_optimization.stage",
        "zero_optimization.stage3_prefetch_bucket_size",
        "scheduler",
    ]
    assert lines[0] == "  - train_micro_batch_size_per_gpu is 16 there, but 2 by train.batch_size"
    assert path in str(error.value)


def test_values_equal_to_the_runs_and_free_choices_are_kept(tmp_path):
    path = write(tmp_path, gradient_clipping=0.5, zero_optimization={"stage": 2, "reduce_bucket_size": 7, "round_robin_gradients": True})
    config = load_ds_config(run_config(TWO, {"zero_stage": 2, "ds_config": path}), TWO, n_params=10)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["round_robin_gradients"] is True


@pytest.mark.parametrize("content", [None, "{not json", "[1]"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    if content:
        path.write_text(content)
    with pytest.raises(EngineError, match="mine.json"):
        load_ds_config(run_config(TWO, {"zero_stage": 1, "ds_config": str(path)}), TWO, n_params=10)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_walk_into_no_trap(path):
    world = World(size=8, device="cuda:0")
    cfg = run_config(world, {"zero_stage": int(path.name[4]), "offload": "offload" in path.name}, precision="bf16")
    assert traps(load_ds_config(cfg, world, 1_200_000_000), cfg, world, 1_200_000_000) == []


def test_each_trap_of_a_users_file_is_told_with_its_value(tmp_path):
    zero = {"stage": 3, "contiguous_gradients": False, "overlap_comm": False, "round_robin_gradients": True}
    more = {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True}, "communication_data_type": "bf16"}
    path = write(tmp_path, zero_optimization=zero, data_types={"grad_accum_dtype": "bf16"}, **more)
    world = World(size=8, device="cuda:0")
    cfg = run_config(world, {"zero_stage": 3, "ds_config": path}, precision="bf16")
    found = traps(load_ds_config(cfg, world, 1_200_000_000), cfg, world, 1_200_000_000)
    assert [line.split(":")[0].rpartition(" is ")[::2] for line in found] == [
        ("zero_optimization.contiguous_gradients", "False"),
        ("zero_optimization.round_robin_gradients", "True"),
        ("wall_clock_breakdown", "True"),
        ("flops_profiler.enabled", "True"),
        ("communication_data_type", "'bf16'"),
        ("data_types.grad_accum_dtype", "'bf16'"),
        ("torch_autocast.lower_precision_safe_modules", "None, by default"),
        ("zero_optimization.reduce_bucket_size", "500000000, by default"),
        ("zero_optimization.overlap_comm", "False"),
        ("zero_optimization.stage3_max_live_parameters", "1000000000, by default"),
    ]
