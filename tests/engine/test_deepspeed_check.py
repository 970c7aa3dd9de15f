"""The start-up check notices a DeepSpeed whose private parts have changed, before a run depends on them."""

import json
from pathlib import Path
from unittest import mock

import pytest
from engine_cases import ENGINES, make_engine, run_config
from ranks import run_ranks

from llm.log import UserError

WAYS = ["offsets of groups", "offsets of parameters", "stale weights", "refusal", "a renamed attribute", "the optimizer's step"]


def shifted(fragments):
    """The same fragments, but said to start one element earlier."""
    return lambda self: ((name, flat, at, max(0, start - 1), n) for name, flat, at, start, n in fragments(self))


def sabotage(world, folder: str) -> dict:
    """The message for each way of breaking what check_deepspeed guards, and for a file with a wrong key."""
    from llm.engine.deepspeed_engine import DeepSpeedEngine as Engine

    replacements = [
        ("zero2", "_fragments_of_groups", shifted(Engine._fragments_of_groups)),
        ("zero3", "_fragments_of_parameters", shifted(Engine._fragments_of_parameters)),
        ("zero1", "_refresh_model", lambda self: None),
        ("zero2", "_spoil_gradients", lambda self: None),
        ("zero3", "_flats", lambda self: self.zero.fp32_partitions),
        ("zero1", "load_state", lambda self, state: None),
    ]
    messages = {}
    for way, (stage, method, replacement) in zip(WAYS, replacements, strict=True):
        with mock.patch.object(Engine, method, replacement):
            messages[way] = refusal(world, ENGINES[stage])
    path = Path(folder, f"mine-{world.rank}.json")
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket": 5}}))
    return messages | {"wrong key": refusal(world, {"zero_stage": 1, "ds_config": str(path)}), "none": refusal(world, ENGINES["zero1"])}


def refusal(world, engine: dict) -> str | None:
    try:
        make_engine(run_config(world, engine), world)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> list[dict]:
    """By rank."""
    folder = tmp_path_factory.mktemp("sabotage")
    return run_ranks(sabotage, 2, folder, str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_sabotage_is_noticed_on_every_rank_and_the_version_is_named(messages, way):
    for rank in messages:
        assert rank["none"] is None
        assert rank[way] and "start-up check" in rank[way] and "deepspeed==0.19" in rank[way] and "engine.zero_stage=0" in rank[way]


def test_a_key_that_deepspeed_does_not_know_is_refused_with_the_file_named(messages):
    for rank in messages:
        assert "mine-" in rank["wrong key"] and "reduce_bucket" in rank["wrong key"]
