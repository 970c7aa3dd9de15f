"""Every engine gives packed rows the losses that their documents have alone."""

import functools
from itertools import product
from unittest import mock

import pytest
import torch
from engine_cases import ENGINES, SEQ_LEN, make_engine, run_config, step_batches
from ranks import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from varlen_stand_in import stand_in

from llm.data.stream import Batch
from llm.dist import World
from llm.engine.protocol import model_inputs
from llm.model.attention import document_mask

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
        for checkpointing, varlen in product((False, True), repeat=2):
            engine, _ = make_engine(run_config(world, kind | {"activation_checkpointing": checkpointing}), world)
            engine.no_varlen = None if varlen else ""
            batches, n_targets = step_batches(0, world)
            with stand_in(), mock.patch("llm.model.transformer.document_mask", None if varlen else document_mask):
                if name != "zero3":  # its hooks want a whole backward pass
                    engine.try_out(packed(batches[0]))
                sums = [engine.evaluate(packed(batches[0]))[0], sum(engine.evaluate(part)[0] for part in alone(batches[0]))]
                losses = [engine.train_step([packed(b) for b in batches], n_targets, 1e-2, lambda _: True).loss for _ in range(4)]
            found[f"{name}, checkpointing {checkpointing}, varlen {varlen}"] = {"sums": sums, "losses": losses}
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_every_engine_keeps_documents_apart(tmp_path, size):
    cases = run_ranks(survey, size, tmp_path)[0]
    reference = cases["torch, checkpointing False, varlen False"]["losses"]
    assert reference[-1] < reference[0]
    for name, case in cases.items():
        assert case["sums"][0] == pytest.approx(case["sums"][1], rel=1e-5), name
        assert case["losses"] == pytest.approx(reference, abs=1e-5), name


def graphs_compiled(world: World) -> list[int]:
    graphs, counts = CompileCounterWithBackend("aot_eager"), []
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=graphs)):
        engine, _ = make_engine(run_config(world, ENGINES["zero2"] | {"compile": True}), world)
    engine.no_varlen = None
    batches, n_targets = step_batches(0, world)
    with stand_in():
        for n in range(SEQ_LEN):
            doc_ids = torch.arange(SEQ_LEN).clamp(max=n).expand(len(batches[0].tokens_BT), -1)
            engine.train_step([Batch(b.tokens_BT, b.targets_BT, doc_ids, b.samples) for b in batches], n_targets, 1e-2, lambda _: True)
            counts.append(graphs.frame_count)
    return counts


def test_deepspeed_hands_blocks_the_tensor_that_is_marked_so_they_are_compiled_once(tmp_path):
    assert run_ranks(graphs_compiled, 1, tmp_path)[0] == [2] * SEQ_LEN  # one for all blocks, and the loss


def test_where_documents_start_is_known_before_the_batch_goes_to_the_device():
    batch = packed(Batch(torch.zeros(2, SEQ_LEN, dtype=torch.int64), torch.zeros(2, SEQ_LEN, dtype=torch.int64), None, None))
    assert model_inputs(batch, "cpu", varlen=True)["doc_starts"].tolist() == [0, 3, 7, SEQ_LEN, SEQ_LEN + 3, SEQ_LEN + 7, 2 * SEQ_LEN]
    assert model_inputs(batch, "meta", varlen=True)["doc_starts"].is_meta  # a device whose tensors have no values to look at
    assert model_inputs(batch, "cpu").keys() == {"tokens_BT", "targets_BT", "doc_ids_BT"}
