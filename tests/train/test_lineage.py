"""What a model was trained on before its run, through fine-tunes, forks, exports and imports.

The folders of the runs before are gone by then.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from little_run import add_shard, make_run, sit
from ranks import run_ranks

from llm.checkpoint import folder
from llm.checkpoint.manifest import NAME, _seal, read_manifest
from llm.checkpoint.resume import open_checkpoint
from llm.data.lineage import FILE, history_of
from llm.dist import World
from tools import ledger as ledger_tool
from tools.export_hf import export
from tools.import_hf import import_folder

TRAINED_ON = {
    "little": (0, 150),
    "sft": (500, 580),
    "sft2": (600, 680),
    "sft3": (700, 780),
}  # ids, and there is a shard 200 to 340 in little
STEPS = {"little": 10, "sft": 3, "sft2": 3, "sft3": 3}


def ask(capsys, monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["ledger.py", *map(str, words)])
    ledger_tool.main()
    return capsys.readouterr().out


def begin(
    world: World, root: Path, name: str, base: Path | None, settings: list[str] = (), **options
) -> Path:
    """A run of this name on data of its own, begun with the weights of `base`."""
    data, (first, last) = root / f"data-{name}", TRAINED_ON[name]
    if not data.exists():
        add_shard(data, root / "tokenizer", first, last)
    begins = {} if base is None else {"init_from": str(base)}
    sit(
        world,
        str(root / "little.json"),
        [f"run_name={name}", f"data_path={data}", "eval_every=0", *settings],
        **begins,
        **options,
    )
    return root / "checkpoints" / name


def live(world: World, root: str) -> dict:
    root = Path(root)
    config, runs = make_run(root), root / "checkpoints"
    sit(world, str(config))
    shutil.copytree(runs / "little", root / "as-it-was")
    sft = begin(world, root, "sft", runs / "little", steps_today=1)
    begin(
        world, root, "sft", None, ["keep_last=1", "save_every=1", "keep_every=1", "thin=true"]
    )  # resumed, thinned
    sft2 = begin(world, root, "sft2", folder.entries(sft)[-1].path)
    export(sft2, root / "hf")
    import_folder(root / "hf", runs / "back")
    sft3 = begin(world, root, "sft3", runs / "back")
    manifests = {
        run.name: read_manifest(folder.entries(run)[-1].path).model_dump(mode="json")
        for run in (runs / "little", sft, sft2)
    }
    shutil.copytree(root / "hf", root / "unnamed")
    (root / "unnamed" / FILE).unlink()
    import_folder(root / "unnamed", runs / "stranger")
    begin(world, root, "sft3", runs / "stranger", ["run_name=of-a-stranger"])
    for gone in (runs / "little", sft2, root / "hf", runs / "back", runs / "stranger"):
        shutil.rmtree(gone)
    return {"manifests": manifests, "last": str(sft3)}


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("lineage")
    return root, run_ranks(live, 1, root, str(root))[0]


def test_a_chain_of_fine_tunes_export_and_import_has_the_ledger_of_each_run_before(lived):
    root, lives = lived
    bases = open_checkpoint(root / "checkpoints" / "sft3").manifest.bases
    assert [(base.kind, base.run, base.step) for base in bases] == [
        ("weights", "little", 10),
        ("weights", "sft", 3),
        ("weights", "sft2", 3),
        ("weights", "back", 0),
    ]
    for base in bases[:3]:
        assert base.ledger == lives["manifests"][base.run]["ledger"]
        assert base.tokens_seen == lives["manifests"][base.run]["tokens_seen"] > 0
    runs = history_of(open_checkpoint(root / "checkpoints" / "sft3")).runs
    assert [
        sum(shard.n_tokens for phase in run.ledger.phases for shard in phase.shards) for run in runs
    ] == [291, 80, 80, 0, 80]


def test_resuming_and_thinning_keep_the_bases(lived):
    root, lives = lived
    found = folder.entries(root / "checkpoints" / "sft", thinned=True)
    assert [(entry.is_whole, entry.step) for entry in found] == [(True, 1), (False, 2), (True, 3)]
    for entry in found:
        (base,) = read_manifest(entry.path).bases
        assert (base.run, base.ledger) == ("little", lives["manifests"]["little"]["ledger"])


def text_of(path: Path, first: int, last: int) -> Path:
    path.write_text(" ".join(f"w{n}" for n in range(first, last)))
    return path


@pytest.mark.parametrize("run", ["little", "sft", "sft2", "sft3"])
def test_a_cut_out_of_what_any_run_of_the_chain_was_trained_on_is_found_and_the_run_is_named(
    lived, tmp_path, capsys, monkeypatch, run
):
    root, _ = lived
    first = TRAINED_ON[run][0]
    file = text_of(tmp_path / "cut.txt", first + 5, first + 75)
    paths = list(root.glob("data*"))
    told = ask(capsys, monkeypatch, "seen", root / "checkpoints" / "sft3", file, "--data", *paths)
    assert f"{file}: fully" in told
    who = "the run itself" if run == "sft3" else f"its base run {run}"
    assert f"7 of 7 windows trained on by {who} (phase p0, steps 1 to {STEPS[run]})" in told
    assert told.count("windows trained on by") == 1 and "not compared" not in told


def test_the_bases_shards_are_looked_for_where_they_were_and_missed_when_they_are_gone(
    lived, tmp_path, capsys, monkeypatch
):
    root, _ = lived
    file = text_of(tmp_path / "cut.txt", 605, 675)
    told = ask(capsys, monkeypatch, "seen", root / "checkpoints" / "sft3", file)
    assert (
        f"{file}: never, but not all could be compared" in told
    )  # an export does not say where data lay
    assert (
        "not compared: 1 shards of 80 tokens that its base run sft2 was trained on, "
        "such as train-00600"
        in told
    )
    told = ask(
        capsys,
        monkeypatch,
        "seen",
        root / "checkpoints" / "sft",
        text_of(tmp_path / "other.txt", 205, 275),
    )
    assert "fully" in told and "its base run little" in told and "not compared" not in told


def test_never_holds_since_the_import_when_nothing_tells_what_was_before(
    lived, tmp_path, capsys, monkeypatch
):
    root, _ = lived
    run, file = root / "checkpoints" / "of-a-stranger", text_of(tmp_path / "cut.txt", 5, 75)
    told = ask(capsys, monkeypatch, "seen", run, file)
    assert f"{file}: never since the import of unnamed\n" in told
    assert "what unnamed was trained on before it was imported is unknown" in told
    assert f"{file}: fully" in ask(capsys, monkeypatch, "seen", run, text_of(file, 705, 775))
    assert "unknown: what unnamed was trained on before it was imported" in ask(
        capsys, monkeypatch, "show", run
    )


def test_show_and_diff_go_back_to_the_first_run(lived, capsys, monkeypatch):
    root, lives = lived
    told = ask(capsys, monkeypatch, "show", root / "checkpoints" / "sft3")
    names = [
        line.split(" at step")[0].split()[-1]
        for line in told.splitlines()
        if line.startswith("began with the weights of")
    ]
    assert names == ["little", "sft", "sft2", "back"]
    assert (
        told.index("train-00200")
        < told.index("train-00500")
        < told.index("train-00600")
        < told.index("train-00700")
    )
    told = ask(
        capsys, monkeypatch, "diff", root / "checkpoints" / "sft3", root / "checkpoints" / "sft"
    )
    assert "seen by both: 3 units of text, 0 of them not as far" in told
    assert "only A has seen: 2 units" in told and "only B has seen: 0 units" in told


def test_weights_that_were_changed_after_the_export_have_an_unknown_part_in_their_history(
    lived, tmp_path
):
    root, _ = lived
    export(root / "checkpoints" / "sft", tmp_path / "hf")
    other = tmp_path / "hf" / "model.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    import_folder(tmp_path / "hf", tmp_path / "back")
    kinds = [(base.kind, base.run) for base in open_checkpoint(tmp_path / "back").manifest.bases]
    assert kinds == [("weights", "little"), ("weights", "sft"), ("imported", "hf")]


def test_an_export_says_nothing_of_where_on_this_machine_the_data_lay(lived, tmp_path):
    root, _ = lived
    assert open_checkpoint(root / "checkpoints" / "sft").manifest.bases[0].data == [
        str(root / "data")
    ]
    export(root / "checkpoints" / "sft", tmp_path / "hf")
    assert str(root) not in (tmp_path / "hf" / FILE).read_text()


def as_of_before(checkpoint: Path) -> None:
    """A checkpoint as a version without bases wrote it."""
    fields = json.loads((checkpoint / NAME).read_text())
    del fields["bases"]
    fields.pop("self_sha256")
    (checkpoint / NAME).write_text(json.dumps(fields | {"self_sha256": _seal(fields)}))


def later(world: World, root: str) -> dict:
    root = Path(root)
    config = str(root / "little.json")
    sit(world, config, steps_today=2)
    as_of_before(folder.entries(root / "checkpoints" / "little")[-1].path)
    sit(world, config, steps_today=2)
    begin(world, root, "sft", root / "checkpoints" / "little")
    sit(
        world,
        config,
        ["run_name=sft", f"data_path={root / 'data-sft'}", "eval_every=0"],
        reset_epoch=True,
        steps_today=1,
    )
    config_2 = ["run_name=trunk", f"data_path={root / 'data'}", "schedule=constant"]
    sit(world, config, config_2, init_from=str(root / "checkpoints" / "sft"), steps_today=2)
    sit(world, config, config_2, anneal=64)
    found = {run.name: folder.entries(run) for run in (root / "checkpoints").iterdir()}
    return {
        name: [read_manifest(e.path).model_dump(mode="json")["bases"] for e in entries]
        for name, entries in found.items()
    }


def test_a_run_older_than_bases_goes_on_and_its_fine_tunes_and_forks_say_what_is_not_recorded(
    tmp_path, capsys, monkeypatch
):
    make_run(tmp_path)
    (lives,) = run_ranks(later, 1, tmp_path, str(tmp_path))
    assert lives["little"] == [None, None]
    for bases in lives["sft"]:
        assert [(b["kind"], b["run"], b["step"]) for b in bases] == [
            ("unrecorded", "little", 0),
            ("weights", "little", 4),
        ]
    assert {tuple((b["kind"], b["run"]) for b in bases) for bases in lives["trunk-anneal-2"]} == {
        (("unrecorded", "little"), ("weights", "little"), ("weights", "sft"), ("forked", "trunk"))
    }
    runs = tmp_path / "checkpoints"
    file = text_of(tmp_path / "else.txt", 900, 990)
    assert f"{file}: never, as far as is recorded" in ask(
        capsys, monkeypatch, "seen", runs / "little", file
    )
    assert "forked (--anneal) from trunk at step 2" in ask(
        capsys, monkeypatch, "show", runs / "trunk-anneal-2"
    )


def test_an_imported_model_answers_every_question(lived, tmp_path, capsys, monkeypatch):
    root, _ = lived
    export(root / "checkpoints" / "of-a-stranger", tmp_path / "hf")
    (tmp_path / "hf" / FILE).unlink()
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert "everything agrees" in ask(capsys, monkeypatch, "verify", tmp_path / "run")
    assert "no step was skipped" in ask(capsys, monkeypatch, "skipped", tmp_path / "run")
    assert "left untrained: 0 tokens" in ask(capsys, monkeypatch, "untrained", tmp_path / "run")
    file = text_of(tmp_path / "cut.txt", 5, 75)
    assert f"{file}: never since the import of hf" in ask(
        capsys, monkeypatch, "seen", tmp_path / "run", file
    )
    told = ask(capsys, monkeypatch, "seen", tmp_path / "run", file, "--data", root / "data")
    assert "7 windows are tokenized, in shards that no phase holds: train-00000" in told
    assert "unknown: what hf was" in ask(capsys, monkeypatch, "show", tmp_path / "run")
    assert "seen by both: 0 units" in ask(
        capsys, monkeypatch, "diff", tmp_path / "run", root / "checkpoints" / "sft3"
    )
