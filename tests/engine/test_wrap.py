"""Activation checkpointing and compilation, with and without ZeRO's hooks on the model."""

import functools
from unittest import mock

import pytest
import torch
from engine_cases import ENGINES, fingerprint, make_engine, run_config, train
from ranks import run_ranks

CASES = ["torch", "zero1", "zero3"]
WAYS = {
    "plain": {},
    "half": {"activation_checkpointing": 0.5},
    "all": {"activation_checkpointing": True},
    "compiled": {"compile": True},
    "half, compiled": {"activation_checkpointing": 0.5, "compile": True},
}


def wrapped(world) -> dict:
    found = {name: {} for name in CASES}
    for name, results in found.items():
        for way, how in WAYS.items():
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            # inductor needs longer to say the same about graphs
            with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
                engine, model = make_engine(run_config(world, ENGINES[name] | how), world)
            calls = []
            if "compile" not in how:  # a hook inside a block would break its graph
                for block in model.blocks:
                    block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            updates = train(engine, world, range(3))
            counters = torch._dynamo.utils.counters
            results[way] = {
                "losses": [u.loss for u in updates],
                "state": fingerprint(engine, world),  # of the moments as well, so of every gradient
                "calls": len(calls),
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return run_ranks(wrapped, 1, tmp_path_factory.mktemp("wrap"))[0]


@pytest.mark.parametrize(("way", "share"), [("half", 0.5), ("all", 1)])
@pytest.mark.parametrize("name", CASES)
def test_the_share_of_blocks_that_is_computed_again_gives_the_same_bits(found, name, way, share):
    plain, checkpointed = found[name]["plain"], found[name][way]
    assert checkpointed["losses"] == plain["losses"]
    assert checkpointed["state"] == plain["state"]
    assert checkpointed["calls"] == (1 + share) * plain["calls"] > 0


@pytest.mark.parametrize("way", ["compiled", "half, compiled"])
@pytest.mark.parametrize("name", CASES)
def test_alone_all_blocks_are_one_graph_and_under_zero_they_share_one_beside_the_loss(found, name, way):
    compiled = found[name][way]
    kinds = 2 if way == "half, compiled" and name != "torch" else 1  # a block that is computed again is another graph
    assert (compiled["graphs"], compiled["breaks"]) == (kinds + 1, 0)
    assert compiled["losses"] == pytest.approx(found[name]["plain"]["losses"], abs=1e-5)
