"""A step that is refused, or whose gradient is not finite on any rank, leaves no trace on any rank."""

import math

import pytest
from engine_cases import ENGINES, OFFLOADED, fingerprint, losses, make_engine, run_config, train
from ranks import run_ranks

CASES = list(ENGINES | OFFLOADED)


def refuse(world) -> dict:
    found = {}
    for name in CASES:
        cfg = run_config(world, (ENGINES | OFFLOADED)[name])
        engine, model = make_engine(cfg, world)
        train(engine, world, range(2))
        before, offered = [fingerprint(engine, world), engine.state()], []

        refused = train(engine, world, range(7, 8), accept=lambda loss, offered=offered: bool(offered.append(loss)))
        after_refused = [fingerprint(engine, world), engine.state()]
        model.spoilt = world.rank == 1
        spoilt = train(engine, world, range(8, 9))
        model.spoilt = False
        after_spoilt = [fingerprint(engine, world), engine.state()]
        next_updates = train(engine, world, range(2, 4))

        calm, _ = make_engine(cfg, world)
        calm_updates = train(calm, world, range(4))
        found[name] = {
            "untouched": [before == after_refused, before == after_spoilt],
            "applied": [u.applied for u in refused + spoilt + next_updates],
            "norms": [math.isnan(u.grad_norm) for u in refused + spoilt + next_updates],
            "offered": offered == [u.loss for u in refused],
            "spoilt loss": math.isfinite(spoilt[0].loss),
            "goes on": [losses(next_updates), fingerprint(engine, world)],
            "never saw it": [losses(calm_updates[2:]), fingerprint(calm, world)],
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    ranks = run_ranks(refuse, 2, tmp_path_factory.mktemp("refuse"))
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.parametrize("name", CASES)
def test_a_refused_batch_changes_nothing(found, name):
    assert found[name]["untouched"] == [True, True]
    assert found[name]["offered"]


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(found, name):
    assert found[name]["applied"] == [False, False, True, True]
    assert found[name]["norms"] == [True, True, False, False]
    assert found[name]["spoilt loss"]


@pytest.mark.parametrize("name", CASES)
def test_the_next_step_is_as_if_the_dropped_ones_had_never_been_seen(found, name):
    assert found[name]["goes on"] == found[name]["never saw it"]
