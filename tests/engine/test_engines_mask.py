"""Every engine gives packed rows the losses that their documents have alone."""

import pytest
import torch
from engine_cases import ENGINES, SEQ_LEN, make_engine, run_config, step_batches
from ranks import run_ranks

from llm.data.stream import Batch
from llm.dist import World

DOC_IDS = torch.tensor([0] * 3 + [1] * 4 + [2] * (SEQ_LEN - 7))


def alone(batch: Batch) -> list[Batch]:
    """Each document of a batch in a batch of its own."""
    masks = [i == DOC_IDS for i in range(3)]
    return [Batch(batch.tokens_BT[:, mask], batch.targets_BT[:, mask], None, batch.samples) for mask in masks]


def packed(batch: Batch) -> Batch:
    return Batch(batch.tokens_BT, batch.targets_BT, DOC_IDS.expand(len(batch.tokens_BT), -1), batch.samples)


def survey(world: World) -> dict:
    found = {}
    for name, kind in ENGINES.items():
        for checkpointing in (False, True):
            engine, _ = make_engine(run_config(world, kind | {"activation_checkpointing": checkpointing}), world)
            batches, n_targets = step_batches(0, world)
            sums = [engine.evaluate(packed(batches[0]))[0], sum(engine.evaluate(part)[0] for part in alone(batches[0]))]
            losses = [engine.train_step([packed(b) for b in batches], n_targets, 1e-2, lambda _: True).loss for _ in range(4)]
            found[f"{name}, checkpointing {checkpointing}"] = {"sums": sums, "losses": losses}
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_every_engine_keeps_documents_apart(tmp_path, size):
    cases = run_ranks(survey, size, tmp_path)[0]
    reference = cases["torch, checkpointing False"]["losses"]
    assert reference[-1] < reference[0]
    for name, case in cases.items():
        assert case["sums"][0] == pytest.approx(case["sums"][1], rel=1e-5), name
        assert case["losses"] == pytest.approx(reference, abs=1e-5), name
