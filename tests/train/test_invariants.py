"""What holds of every checkpoint of a run: each rule of the table has manifests that break it, sealed again, and none that a run has written."""

import shutil
import sys
from pathlib import Path

import pytest
from little_run import add_shard, make_run, message_of, newest_manifest, sit, sit_alone
from ranks import run_ranks
from resealing import forge
from test_commands import command

from llm.checkpoint import folder
from llm.checkpoint.invariants import INVARIANTS, contradictions
from llm.checkpoint.manifest import NAME, read_manifest
from llm.cli import NEEDS_A_PERSON
from llm.config import load_config
from llm.log import UserError
from llm.train.invariants import RESUMABLE

ROWS = 4


def many_lives(world, config: str, data: str, tokenizer: str) -> None:
    """Two attempts, a batch of another size, a step back, and a second phase."""
    sit(world, config, steps_today=3)
    sit(world, config, ["train.batch_tokens=64"], steps_today=2, accept_change=("train.batch_tokens",))
    sit(world, config, ["train.batch_tokens=64"], steps_today=1)
    sit(world, config, from_step=5, accept_change=("train.batch_tokens",))
    add_shard(Path(data), Path(tokenizer), 500, 580)
    sit(world, config, only_new=True)


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> Path:
    """The config of a run that has been through all that."""
    root = tmp_path_factory.mktemp("lived")
    config = make_run(root, save_every=2)
    run_ranks(many_lives, 1, root, str(config), str(root / "data"), str(root / "tokenizer"))
    return config


def test_nothing_that_a_run_has_written_contradicts_itself(lived):
    found = folder.entries(load_config(lived).run_folder)
    manifests = [read_manifest(entry.path) for entry in found]
    assert [c for entry, m in zip(found, manifests, strict=True) for c in contradictions(entry.path, m, RESUMABLE)] == []
    assert {m.global_rows for m in manifests} == {ROWS, 2 * ROWS} and len(manifests[-1].ledger["phases"]) == 2 and len(found) > 6
    assert {m.batch_since.step for m in manifests} == {0, 3, 5}


# ------------------------------------------------------------------ broken


def last_phase(m: dict) -> dict:
    return m["ledger"]["phases"][-1]


def only_unfinished(m: dict) -> None:
    m["ledger"]["phases"][0]["consumed"] -= 1


def no_phases(m: dict) -> None:
    m["ledger"]["phases"] = []


def batch_since_its_first_step(m: dict) -> None:
    """With a draw that no whole batch has taken."""
    before = sum(phase["consumed"] for phase in m["ledger"]["phases"][:-1])
    m["batch_since"] = {"step": last_phase(m)["first_step"], "draws": before + 1}


def set_in(m: dict, path: str, value) -> None:
    *parents, key = path.split(".")
    for part in parents:
        m = m[int(part) if part.isdigit() else part]
    m[key] = value(m[key]) if callable(value) else value


def put(path: str, value):
    return lambda m: set_in(m, path, value)


BROKEN = {
    "name": [put("step", lambda n: n + 1), put("step", 0), put("attempt", 9), put("attempt", 0), put("format", "tally-weights/1")],
    "run": [
        put("run_id", "f" * 32), put("run_id", ""), put("run_id", lambda now: now[::-1]), put("run_id", "r"), put("run_id", lambda now: now + "0"),
    ],
    "files": [
        lambda m: m["files"].append(m["files"][0]), lambda m: m["files"].append(m["files"][-1]), put("params.0.shape", [1]),
        lambda m: m["files"][0]["chunks"].pop(), lambda m: m["params"].append({"name": "extra", "shape": [2]}),
    ],
    "state hash": [put("state_hash", n) for n in (2**63, -(2**63) - 1, 2**64, 10**30, -(10**30))],
    "digests": [
        put("chain", "not hex"), put("chain", "abc"), put("chain", lambda now: now.upper()), put("parent.manifest_sha256", "x" * 64),
        put("probe.rows", ""), put("probe.place", "-1"),
    ],
    "parent": [
        put("parent.name", name) for name in ("", "best", "../step-000000001-a1", "step-000000001", "step-999999999-a1", "weights-000000099-a1")
    ],
    "lineage": [
        put("lineage", ["step-000000099-a1"]), put("lineage", ["step-000000002-a99"]), put("lineage", lambda now: [*now, now[0]]),
        put("lineage", lambda now: [now[-1], *now[:-1]]), put("lineage", ["step-000000003-a2", "step-000000003-a1"]),
    ],
    "batch": [put("global_rows", 0), put("world_size", 0), put("world_size", 3), put("world_size", 5), put("world_size", 8)],
    "model": [
        put("config.model.norm", "batchnorm"), put("config.model.new", 1), put("config.model.n_heads", 0), put("config.model.n_kv_heads", 3),
        put("config.model", [1]),
    ],
    "config": [
        put("config", {}), put("config.train", 1), put("config.train", []), put("config", {"train": {}}), put("config", {"model": {}, "train": None}),
    ],
    "settings": [
        put("config.train.ema", 0.999), put("config.moe", {"experts": 8}), put("config.data.mixture", None), put("config.engine.fp8", True),
        put("config.moe", 7), put("config.eval.tasks2", []),
    ],
    "configured batch": [put("global_rows", n) for n in (1, 3, 5, 8, 400)],
    "ledger": [
        no_phases, only_unfinished, put("ledger", {}), put("ledger.version", 99), put("tokens_seen", 10**6), put("engine", {}),
        put("engine.optimizer_step", -5), put("engine.optimizer_step", lambda n: n + 1), put("engine.optimizer_step", lambda n: n - 1),
        put("engine.optimizer_step", "7"), put("engine.optimizer_step", True),
        lambda m: last_phase(m).update(consumed=last_phase(m)["consumed"] - 1), lambda m: last_phase(m).update(consumed=0),
        lambda m: last_phase(m).update(consumed=last_phase(m)["consumed"] + 1), lambda m: last_phase(m).update(consumed=ROWS),
        lambda m: last_phase(m).update(last_step=last_phase(m)["last_step"] - 1), lambda m: last_phase(m).update(first_step=1),
        lambda m: last_phase(m).update(name=m["ledger"]["phases"][0]["name"]), put("config.model.seq_len", 16),
        batch_since_its_first_step, put("batch_since", {"step": 10**6, "draws": 0}),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def halfway(lived, tmp_path_factory) -> Path:
    """A run like it whose newest checkpoint is within its second phase."""
    root = tmp_path_factory.mktemp("halfway")
    shutil.copytree(lived.parent, root / "run", ignore=shutil.ignore_patterns("meet-*"))
    config = root / "run" / "little.json"
    config.write_text(config.read_text().replace(str(lived.parent), str(config.parent)))
    add_shard(config.parent / "data", config.parent / "tokenizer", 600, 700)
    sit_alone(root, config, [], None, only_new=True, steps_today=2)
    return config


@pytest.fixture
def newest(halfway) -> Path:
    """Its newest checkpoint, whose manifest is put back afterwards."""
    path = folder.entries(load_config(halfway).run_folder)[-1].path
    before = (path / NAME).read_bytes()
    yield path
    (path / NAME).write_bytes(before)


def test_each_rule_of_the_table_has_manifests_that_break_it():
    assert set(BROKEN) == set(RESUMABLE) and set(INVARIANTS) < set(RESUMABLE) and all(len(cases) >= 5 for cases in BROKEN.values())


@pytest.mark.parametrize("rule", BROKEN)
def test_a_manifest_that_breaks_a_rule_and_is_sealed_again_is_named_by_that_rule(newest, rule):
    before, whole = (newest / NAME).read_bytes(), read_manifest(newest)
    assert contradictions(newest, whole, RESUMABLE) == []
    for n, change in enumerate(BROKEN[rule]):
        (newest / NAME).write_bytes(before)
        forge(newest, change)
        assert contradictions(newest, read_manifest(newest), {rule: RESUMABLE[rule]}), (rule, n)


def go_on(world, config: str, checkpoint: str) -> list:
    """What a sitting says to the first manifest that breaks each rule, and its exit code."""
    path, told = Path(checkpoint, NAME), {}
    before = path.read_bytes()
    for rule, cases in BROKEN.items():
        forge(Path(checkpoint), cases[0])
        try:
            sit(world, config, only_new=True)
            told[rule] = ["went on", 0]
        except UserError as error:
            told[rule] = [str(error), error.exit_code]
        path.write_bytes(before)
    return told


def test_training_refuses_all_of_them_with_the_code_for_a_person_and_moves_nothing(halfway, newest, tmp_path):
    run = load_config(halfway).run_folder
    before = {p.name for p in run.iterdir()}
    (told,) = run_ranks(go_on, 1, tmp_path, str(halfway), str(newest))
    assert set(told) == set(BROKEN)
    for rule, (text, code) in told.items():
        assert code == NEEDS_A_PERSON and str(newest / NAME) in text, (rule, text)
    assert {p.name for p in run.iterdir()} == before


# ------------------------------------------------------------------ commands


def test_a_renamed_checkpoint_is_neither_gone_on_from_nor_generated_with(lived, tmp_path):
    shutil.copytree(lived.parent, tmp_path / "run", ignore=shutil.ignore_patterns("meet-*"))
    config = tmp_path / "run" / "little.json"
    config.write_text(config.read_text().replace(str(lived.parent), str(config.parent)))
    run = load_config(config).run_folder
    copy = shutil.copytree(run / "step-000000002-a1", run / "step-000000099-a99")
    before = {p.name for p in run.iterdir()}
    (told,) = run_ranks(message_of, 1, tmp_path, str(config), [])
    done = command(sys.executable, "launch/generate.py", run, "--step", "99", "--prompt", "w1")
    assert done.returncode == NEEDS_A_PERSON and "Traceback" not in done.stderr, done.stderr
    for text in (told, done.stderr):
        assert copy.name in text and "step-000000002-a1" in text and "went on" not in text
    assert {p.name for p in run.iterdir()} == before
    assert newest_manifest(lived).step > 2
