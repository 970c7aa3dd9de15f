"""One run that moves from topology to topology: the same state after every load, every sample once, the losses of the run that never moved."""

import json
from pathlib import Path

import pytest
import torch
from counts import TORTURE, done, torture
from little_run import fed_by_step, fed_targets, losses
from lives import CORPUS, committed, fault_run, live, uninterrupted
from ranks import run_ranks

from llm.checkpoint.manifest import Manifest, Parameter
from llm.checkpoint.resume import newest
from llm.checkpoint.saver import save
from llm.checkpoint.slices import KINDS, Slice
from llm.config import load_config
from llm.data.audit import audit_phase, step_problems
from llm.data.ledger import Ledger
from llm.dist import World

pytestmark = pytest.mark.timeout(300)

# (ZeRO stage, ranks), two steps each: ranks 1, 2, 4, 1 and stages torch, 1, 2, 3, torch, each pair of neighbours different in both
WALK = [(0, 1), (1, 2), (2, 4), (3, 1), (0, 2)]
LONG_WALK = [*WALK, (3, 4), (1, 1), (2, 2), (0, 4), (3, 2), (2, 1), (1, 4), (0, 1), (3, 1)]


def test_ranks_and_stages_change_from_sitting_to_sitting_and_the_state_does_not(tmp_path):
    walk = LONG_WALK if TORTURE else WALK
    epochs = 3 if TORTURE else 1
    fixed = uninterrupted(tmp_path / "fixed", 1, epochs=epochs)
    config = fault_run(tmp_path, epochs=epochs, save_every=0)
    run = load_config(config).run_folder
    for n, (stage, ranks) in enumerate(walk):
        last = n == len(walk) - 1
        saved = newest(World(), run).manifest.state_hash if n else None
        life = live(config, ranks, f"zero_stage={stage}", note_state=True, **({} if last else {"steps_today": 2}))
        assert life.codes == [0] * ranks, life.output
        if n:
            assert json.loads((config.parent / "loaded.json").read_text()) == saved, (stage, ranks)
            done["states compared after a load"] += 1
    assert committed(config)[-1] == fixed.step
    assert fed_targets(tmp_path / "fed") == dict.fromkeys(CORPUS, epochs)
    assert fed_by_step(tmp_path / "fed") == fed_by_step(fixed.config.parent / "fed")
    manifest = newest(World(), run).manifest
    ledger = Ledger.from_json(manifest.ledger)
    assert audit_phase(ledger.phases[0], {}).problems == [] == step_problems(ledger, fixed.step)
    assert manifest.chain == fixed.chain
    assert losses(config) == pytest.approx(fixed.losses, abs=1e-4)


def save_three_values(world: World, run: str) -> int:
    values = torch.arange(3.0)[world.rank : world.rank + 1]  # nothing on rank 3
    manifest = Manifest(
        run_id="r", attempt=1, step=1, tokens_seen=0, parent=None, world_size=world.size, global_rows=4, config={}, tokenizer_fingerprint="f",
        ledger={}, chain="", engine={}, versions={}, metrics={}, epoch_end=False, params=[Parameter(name="w", shape=[3])], files=[], state_hash=0,
    )  # fmt: skip
    save(world, Path(run), manifest, [Slice("w", kind, min(world.rank, 3), values) for kind in KINDS], lambda _: None)
    return len(values)


@torture
def test_more_ranks_than_a_parameter_has_values_leave_some_with_none(tmp_path):
    (tmp_path / "run").mkdir()
    assert run_ranks(save_three_values, 4, tmp_path, str(tmp_path / "run")) == [1, 1, 1, 0]
    assert newest(World(), tmp_path / "run").reader.read_full("w").tolist() == [0, 1, 2]
