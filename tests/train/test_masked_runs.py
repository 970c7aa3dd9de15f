"""Training on conversations: only the assistant's tokens move weights, documents are kept apart, and the ledger accounts for it all."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from little_run import SEQ_LEN, add_shard, fed_by_step, fed_targets, losses, make_run, make_tokenizer, newest_ledger, sit
from ranks import run_ranks
from varlen_stand_in import stand_in

from llm.config import ConfigError, load_config
from llm.data.phase import Phase
from llm.data.sampler import Sampler
from llm.data.shards import Shard
from llm.data.stream import count_targets, micro_batches
from llm.dist import World
from llm.engine import build_engine
from llm.model.init import build_model
from llm.train.loop import NO_TARGETS

ROOT = Path(__file__).parents[2]
LENGTHS = [9, 3, 20, 1, 7, 7, 5, 14, 4, 30]  # a hundred tokens
SPANS = np.array([[2, 5], [10, 2], [20, 30], [60, 35]])
COUNTED = {int(i) for start, n in SPANS for i in range(start, start + n)}
APART = COUNTED - {0, *np.cumsum(LENGTHS).tolist()}  # no document's first token


def make_chats(root: Path, **changes) -> Path:
    """A config for one shard of ids 0 to 99 in documents of LENGTHS, of which SPANS carry loss."""
    config = make_run(root, data_path=str(root / "chats"), eval_every=0, **changes)
    add_shard(root / "chats", root / "tokenizer", 0, 100, lengths=LENGTHS, mask_spans=SPANS)
    return config


def test_the_gradient_of_a_users_token_is_exactly_zero_and_counted_tokens_alone_share_the_loss(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    shard = Shard.open(add_shard(tmp_path / "chats", tokenizer, 0, 100, lengths=LENGTHS, mask_spans=SPANS))
    sampler = Sampler(Phase.plan("p0", 1, 1, SEQ_LEN, [shard]), [shard])
    batches = micro_batches(sampler, 0, 12, 0, 1, 6)
    n_targets, cfg = count_targets(batches), load_config(make_run(tmp_path / "run"), ["model.vocab_size=2048"])
    assert n_targets == sum(token in COUNTED for row in batches for token in (row.tokens_BT + 1).flatten().tolist())

    model, hidden, grads = build_model(cfg.model, 1), [], []
    weight_VD = model.head.weight.detach().clone()

    def listen(_, inputs):
        hidden.append(inputs[0].detach())
        inputs[0].register_hook(lambda grad: grads.append(grad.clone()))

    model.head.register_forward_pre_hook(listen)
    build_engine(cfg, World(), model).train_step(batches, n_targets, 1e-3, lambda _: True)
    for batch, x_BTD, grad_BTD in zip(batches, hidden, grads, strict=True):
        is_counted = torch.tensor([[token in COUNTED for token in row] for row in (batch.tokens_BT + 1).tolist()])
        assert is_counted.any() and not is_counted.all()
        assert (grad_BTD[~is_counted] == 0).all()
        wanted = (x_BTD @ weight_VD.T).softmax(-1) - torch.nn.functional.one_hot(batch.tokens_BT + 1, 2048)
        torch.testing.assert_close(grad_BTD[is_counted], (wanted @ weight_VD / n_targets)[is_counted], atol=1e-7, rtol=1e-3)


CUTS = {"windows": [], "apart": ["document_mask=true"], "packed": ["document_mask=true", "packing=bestfit"]}


@pytest.mark.parametrize("cut", CUTS)
def test_speed_counts_every_token_that_was_computed_and_the_targets_have_a_number_of_their_own(tmp_path, cut):
    config = make_chats(tmp_path)
    run_ranks(whole, 2, tmp_path, str(config), CUTS[cut], str(tmp_path / "fed"))
    cfg = load_config(config, CUTS[cut])
    shard = Shard.open(next((tmp_path / "chats").glob("train-*.meta.json")))
    sampler = Sampler(newest_ledger(config).phases[0], [shard])
    batches = micro_batches(sampler, 0, 16, 0, 1, 16)
    inputs = sum(int((batch.tokens_BT < 100).sum()) for batch in batches)  # the text's ids: padding has another
    assert len(sampler.windows) <= 16 and (cut == "packed" or inputs == 100)
    (did,) = (json.loads(line) for line in (cfg.log_folder / "sittings.jsonl").read_text().splitlines())
    assert did["tokens_computed"] == inputs
    assert did["tokens"] == (len(COUNTED - {0}) if cut == "windows" else len(APART)) == fed_targets(tmp_path / "fed").total()
    assert did["tokens_per_s"] * did["tokens"] == pytest.approx(did["target_tokens_per_s"] * inputs, rel=1e-3)


def interrupted(world, config: str, cut: list[str], fed: str) -> dict:
    sit(world, config, [*cut, "zero_stage=2"], fed, steps_today=1)
    return sit(world, config, cut, fed)


def whole(world, config: str, cut: list[str], fed: str) -> dict:
    return sit(world, config, cut, fed)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_each_counted_token_is_trained_on_once_through_ranks_and_stages_and_the_audit_agrees(tmp_path, cut):
    config, alone = make_chats(tmp_path), make_chats(tmp_path / "alone")
    last = run_ranks(interrupted, 2, tmp_path, str(config), cut, str(tmp_path / "fed"))[0]
    (undisturbed,) = run_ranks(whole, 1, tmp_path, str(alone), cut, str(tmp_path / "fed-alone"))
    assert fed_targets(tmp_path / "fed") == dict.fromkeys(APART if cut else COUNTED, 1)
    assert fed_by_step(tmp_path / "fed") == fed_by_step(tmp_path / "fed-alone") and last["chain"] == undisturbed["chain"]
    for step, loss in losses(alone).items():
        assert losses(config)[step] == pytest.approx(loss, abs=1e-5), step
    done = subprocess.run(
        [sys.executable, "tools/ledger.py", "verify", load_config(config).run_folder], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "everything agrees" in done.stdout, done.stdout + done.stderr


def with_kernel(world, config: str, trouble: str | None) -> dict:
    with stand_in(), mock.patch("llm.engine.agreed_varlen_trouble", return_value=trouble):
        return sit(world, config, CUTS["packed"])


def test_a_run_without_masks_has_the_losses_of_one_with_them_and_the_log_says_which_it_is(tmp_path):
    configs = {trouble: make_chats(tmp_path / str(trouble)) for trouble in (None, "for a test")}
    for trouble, config in configs.items():
        run_ranks(with_kernel, 1, tmp_path, str(config), trouble)
    assert losses(configs[None]) == pytest.approx(losses(configs["for a test"]), abs=1e-5)
    logs = {trouble: (load_config(config).log_folder / "rank-0.log").read_text() for trouble, config in configs.items()}
    assert "attention: varlen_attn, flash kernel, each document by itself; " in logs[None]
    assert "attention: sdpa, flash kernel, masked (not varlen_attn: for a test); " in logs["for a test"]


def change_in_the_middle(world, config: str) -> list[str]:
    sit(world, config, ["document_mask=true"], steps_today=1)
    said = []
    for cut in ([], CUTS["packed"]):
        try:
            sit(world, config, cut)
        except ConfigError as error:
            said.append(str(error))
    return said


def test_an_open_phase_never_changes_how_its_rows_are_cut(tmp_path):
    (said,) = run_ranks(change_in_the_middle, 1, tmp_path, str(make_chats(tmp_path)))
    assert "document_mask is False" in said[0] and "has True and None" in said[0]
    assert "packing bestfit" in said[1]


def in_two_sittings(world, config: str) -> dict:
    sit(world, config, steps_today=3)
    return sit(world, config)


def test_steps_in_which_nobody_answers_are_noted_and_train_nothing(tmp_path):
    config = make_run(tmp_path, data_path=str(tmp_path / "chats"), eval_every=0)
    add_shard(tmp_path / "chats", tmp_path / "tokenizer", 0, 300, lengths=[300], mask_spans=np.array([[1, 8]]))
    (ended,) = run_ranks(in_two_sittings, 1, tmp_path, str(config))
    skipped = newest_ledger(config).phases[0].skipped
    assert ended["step"] == 10 and len(skipped) == 9 and {s.reason for s in skipped} == {NO_TARGETS}
    assert len(losses(config)) == 1
