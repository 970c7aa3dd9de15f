"""The chat template of a run: from its data into its checkpoints, and out of them again."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from generate.test_generate_run import save_model, settled_config
from little_run import add_shard, make_run, newest_manifest, sit
from ranks import run_ranks

from llm.checkpoint.folder import entries
from llm.checkpoint.template import read_template
from llm.config import load_config
from llm.corpus.conversations import CHATML, Template, kept_template
from llm.log import UserError
from llm.model.init import build_model
from llm.tokenizer.train import train_bpe

LAUNCH = Path(__file__).parents[2] / "launch"
MINE = Template("<{role}> {content}\n", special=(), roles=(("user", "me"),), system="kind", name="mine.yaml")


def make_chats(root: Path) -> Path:
    """A config for chats in MINE; beside them chats in ChatML, and plain text."""
    config = make_run(root, data_path=str(root / "chats"), eval_every=0, thin=True, keep_last=1)
    add_shard(root / "plain", root / "tokenizer", 300, 340)
    add_shard(root / "chats", root / "tokenizer", 0, 40, template=MINE.to_json())
    add_shard(root / "renamed", root / "tokenizer", 100, 140, template=MINE.to_json() | {"name": "yours.yaml"})
    add_shard(root / "chatml", root / "tokenizer", 200, 240, template=CHATML.to_json())
    return config


def sittings(world, root: str, config: str) -> dict:
    """The template after each sitting, by what it trained on, and the messages of those that were refused."""
    found = {}

    def one(name: str, *data: str, run: str = "little", **options) -> None:
        settings = [f"data_path=[{', '.join(f'{root}/{folder}' for folder in data)}]", f"run_name={run}"]
        try:
            sit(world, config, settings, **options)
            found[name] = read_template(entries(Path(root, "checkpoints", run))[-1].path)
        except UserError as error:
            found[name] = str(error)

    one("begun", "chats", steps_today=2)
    one("two forms", "chats", "chatml", run="both")
    one("ended", "chats", "renamed")
    one("another", "chats", "chatml", only_new=True)
    one("another alone", "chatml", only_new=True)
    one("plain text", "plain", only_new=True)
    one("its weights, plain text", "plain", run="next", init_from=f"{root}/checkpoints/little", steps_today=1)
    one("its weights, another", "chatml", run="other", init_from=f"{root}/checkpoints/little", steps_today=1)
    one("accepted", "chatml", only_new=True, accept_change=("template",))
    return found


def test_the_template_of_the_data_travels_with_the_weights_and_another_one_is_refused_until_accepted(tmp_path):
    config = make_chats(tmp_path)
    (found,) = run_ranks(sittings, 1, tmp_path, str(tmp_path), str(config))
    for name in ("begun", "ended", "plain text", "its weights, plain text"):
        assert found[name] | {"name": ""} == MINE.to_json() | {"name": ""}, name
    assert found["its weights, another"] == found["accepted"] == CHATML.to_json()
    for name in ("two forms", "another"):
        assert "of chats were written with the template mine.yaml, those of chatml with ChatML" in found[name]
    assert "template ChatML, those that this run knows with mine.yaml" in found["another alone"]
    assert "--accept-change template" in found["another alone"]
    assert not (tmp_path / "checkpoints" / "both").exists()
    run = load_config(config).run_folder
    assert "tokenizer/template.json" in [file.path for file in newest_manifest(config).files]  # hashed with the others
    assert f"Try the model: python launch/chat.py {run}\n" in (run / "logs" / "rank-0.log").read_text()
    thinned = [entry.path for entry in entries(run, thinned=True) if entry.path.name.startswith("weights")]
    assert thinned and all(kept_template(path) == MINE for path in thinned)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    tokenizer = train_bpe(["plain bytes"], vocab_size=256).tokenizer
    template = Template("<|talk|>{role}\n{content}<|im_end|>", special=("<|talk|>", "<|im_end|>"), name="mine.yaml")
    save_model(folder, 1, build_model(settled_config(tokenizer), seed=1), tokenizer, template)
    return folder


def call(script: str, *words) -> None:
    spec = importlib.util.spec_from_file_location(script, LAUNCH / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [script, *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before


def test_chat_speaks_in_the_template_of_the_checkpoint_unless_told_otherwise(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match="special token '<|talk|>'"):
        call("chat", run, "--device", "cpu")
    (tmp_path / "chatml.json").write_text(json.dumps(CHATML.to_json()))
    call("chat", run, "--device", "cpu", "--template", tmp_path / "chatml.json")
    assert "step 1, on cpu" in capsys.readouterr().out


def test_evaluation_writes_chats_in_the_template_of_the_checkpoint(run, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n")
    call("evaluate_model", run, "--device", "cpu", "--tasks", "perplexity", "--text", tmp_path / "chat.jsonl", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "step-000000001-a1" / "results.json").read_text())
    assert results[f"perplexity/{tmp_path / 'chat.jsonl'}"]["bytes"] == len("<|talk|>user\nhi<|im_end|><|talk|>assistant\nho<|im_end|>")


def test_a_checkpoint_without_one_is_spoken_to_in_chatml_and_a_damaged_one_is_named(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    assert kept_template(tmp_path) is None and read_template(tmp_path) is None
    (tmp_path / "tokenizer" / "template.json").write_text('{"turn": "x"}')
    with pytest.raises(UserError, match="template.json: 'turn' must hold"):
        kept_template(tmp_path)
    with pytest.raises(UserError, match="template.json: holds no chat template"):
        read_template(tmp_path)
