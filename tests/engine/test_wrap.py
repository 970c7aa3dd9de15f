"""Activation checkpointing and compilation, with and without ZeRO's hooks on the model."""

import functools
from unittest import mock

import pytest
import torch
from engine_cases import ENGINES, make_engine, run_config, train
from ranks import run_ranks

CASES = ["torch", "zero1", "zero3"]


def wrapped(world) -> dict:
    found = {name: {} for name in CASES}
    for name, results in found.items():
        for how in ({}, {"activation_checkpointing": True}, {"compile": True}, {"activation_checkpointing": True, "compile": True}):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            # inductor needs longer to say the same about graphs
            with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
                engine, model = make_engine(run_config(world, ENGINES[name] | how), world)
            calls = []
            if "compile" not in how:  # a hook inside a block would break its graph
                model.blocks[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            updates = train(engine, world, range(3))
            counters = torch._dynamo.utils.counters
            results["+".join(how) or "plain"] = {
                "losses": [u.loss for u in updates],
                "calls": len(calls),
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return run_ranks(wrapped, 1, tmp_path_factory.mktemp("wrap"))[0]


@pytest.mark.parametrize("name", CASES)
def test_activation_checkpointing_computes_the_same_numbers_twice(found, name):
    plain, checkpointed = found[name]["plain"], found[name]["activation_checkpointing"]
    assert checkpointed["losses"] == plain["losses"]
    assert checkpointed["calls"] == 2 * plain["calls"] > 0


@pytest.mark.parametrize("how", ["compile", "activation_checkpointing+compile"])
@pytest.mark.parametrize("name", CASES)
def test_alone_all_blocks_are_one_graph_and_under_zero_they_share_one_beside_the_loss(found, name, how):
    compiled = found[name][how]
    assert (compiled["graphs"], compiled["breaks"]) == (2, 0)
    assert compiled["losses"] == pytest.approx(found[name]["plain"]["losses"], abs=1e-5)
