"""The probe: a loss saved with the weights and computed again after loading, so that weights which mean something else are noticed."""

import os
import re

import pytest
from little_run import add_shard, make_run, newest_manifest, sit_alone, sit_with
from ranks import run_ranks

from llm.config import load_config

BITWISE, NEARLY, NOT_COMPARED = "bit for bit as saved", "saved with", "is not compared"


def log_of(config) -> str:
    return (load_config(config).run_folder / "logs" / "rank-0.log").read_text()


def two_sittings(world, config: str, settings: list[str]) -> dict:
    sit_with(world, config, settings, {"steps_today": 3})
    return sit_with(world, config, settings, {"steps_today": 2})


CASES = [(0, 2, "bf16"), (3, 2, "fp32"), (0, 1, "fp32"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 2, "bf16")]


@pytest.mark.parametrize(("stage", "ranks", "precision"), CASES if os.environ.get("TORTURE") else CASES[:2])
def test_on_the_same_ranks_the_loss_after_loading_is_the_saved_one_bit_for_bit(tmp_path, stage, ranks, precision):
    config = make_run(tmp_path, zero_stage=stage, precision=precision)
    run_ranks(two_sittings, ranks, tmp_path, str(config), [])
    assert 5 < newest_manifest(config).probe.loss < 9
    assert BITWISE in log_of(config)


def test_on_other_ranks_stages_and_precisions_it_is_the_same_within_tolerance(tmp_path):
    config = make_run(tmp_path)
    run_ranks(sit_with, 2, tmp_path, str(config), ["zero_stage=3"], {"steps_today": 2})
    sit_alone(tmp_path, config, ["batch_size=4"], steps_today=2)
    sit_alone(tmp_path, config, ["precision=bf16"], steps_today=2, accept_change=("engine.precision",))
    assert log_of(config).count("The probe batch has loss") == 2 and NOT_COMPARED not in log_of(config)


def evaluate_otherwise(world, config: str, factor: float, settings: list[str], accepted: list[str]) -> str:
    """As a change in the model's code would: the weights load soundly and give another loss."""
    from little_run import sit

    from llm.engine import torch_engine
    from llm.log import UserError

    original = torch_engine.TorchEngine.evaluate

    def changed(self, batch):
        loss, n = original(self, batch)
        return loss * factor, n

    torch_engine.TorchEngine.evaluate = changed
    try:
        sit(world, config, settings, steps_today=1, accept_change=tuple(accepted))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


@pytest.mark.parametrize(("settings", "factor"), [([], 1 + 1e-12), (["batch_size=2"], 1.01)])
def test_another_loss_is_refused_with_both_values_unless_it_is_accepted(tmp_path, settings, factor):
    config = make_run(tmp_path)
    sit_alone(tmp_path, config, [], steps_today=2)
    before = newest_manifest(config)
    saved = before.probe.loss
    (message,) = run_ranks(evaluate_otherwise, 1, tmp_path, str(config), factor, settings, [])
    assert message.startswith("CheckpointError: step 2") and repr(saved) in message and "--accept-change probe" in message
    assert float(re.search(r"and (\S+) now", message)[1]) == pytest.approx(saved * factor, rel=1e-13 if not settings else 1e-5)
    assert newest_manifest(config) == before
    # on other ranks too, and all of them refuse together
    first, second = run_ranks(evaluate_otherwise, 2, tmp_path, str(config), 1.5, ["batch_size=1"], [])
    assert first == second and first.startswith("CheckpointError")
    assert run_ranks(evaluate_otherwise, 1, tmp_path, str(config), factor, settings, ["probe"]) == ["went on"]


def test_new_data_beside_the_old_do_not_change_what_is_probed_and_data_that_are_gone_are_told(tmp_path):
    config = make_run(tmp_path)
    sit_alone(tmp_path, config)
    for first in range(500, 900, 50):
        add_shard(tmp_path / "data", tmp_path / "tokenizer", first, first + 40)
    add_shard(tmp_path / "new", tmp_path / "tokenizer", 1000, 1100)
    run_ranks(new_data, 1, tmp_path, str(config), str(tmp_path / "new"))
    assert log_of(config).count(BITWISE) == 1 and log_of(config).count(NOT_COMPARED) == 1


def new_data(world, config: str, folder: str) -> None:
    from little_run import sit

    sit(world, config, only_new=True)
    sit(world, config, [f"data_path={folder}"], only_new=True)
