"""The reference engine against a training step written out by hand, and its optimizer."""

import math

import torch
from engine_cases import MODEL, make_engine, run_config, step_batches, step_rows

from llm.config import ModelConfig
from llm.dist import World
from llm.engine.optimizer import build_adamw
from llm.model.init import build_model

ALONE = World()


def test_a_step_equals_adamw_on_the_whole_batch_at_once():
    cfg = run_config(ALONE, {"zero_stage": 0}, clip_norm=0.1)
    engine, model = make_engine(cfg, ALONE)
    by_hand = build_model(cfg.model, seed=1)
    plain = [p for name, p in by_hand.named_parameters() if p.ndim == 1 or name.startswith(("embed", "positions"))]
    decayed = [p for p in by_hand.parameters() if all(p is not q for q in plain)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, lr in enumerate([1e-2, 3e-3]):
        batches, n_targets = step_batches(step, ALONE)
        update = engine.train_step(batches, n_targets, lr, lambda loss: True)

        loss = by_hand(*step_rows(step)) / n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        for group in groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.5  # else clipping would not count
        assert math.isclose(update.loss, loss.item(), rel_tol=1e-6)
        assert math.isclose(update.grad_norm, norm.item(), rel_tol=1e-5)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_matrices_decay():
    cfg = run_config(ALONE, {"zero_stage": 0}, weight_decay=0.3)
    for tied in (True, False):
        model = build_model(ModelConfig(**MODEL | {"positions": "learned", "tie_embeddings": tied}), seed=1)
        names = {id(p): name for name, p in model.named_parameters()}
        decay = {names[id(p)]: g["weight_decay"] for g in build_adamw(model, cfg.train).param_groups for p in g["params"]}
        assert decay.keys() == set(names.values())
        untouched = {name for name, d in decay.items() if d == 0}
        assert untouched == {n for n in decay if n.endswith("bias") or "norm" in n} | {"embed.weight", "positions.weight"}
        assert ("head.weight" in decay) is not tied


def test_no_clip_norm_leaves_gradients_alone():
    moved = []
    for clip_norm in (None, 1e6):
        engine, model = make_engine(run_config(ALONE, {"zero_stage": 0}, clip_norm=clip_norm), ALONE)
        batches, n_targets = step_batches(0, ALONE)
        engine.train_step(batches, n_targets, 1e-2, lambda loss: True)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*moved)
