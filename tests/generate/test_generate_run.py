import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_terminal import on_a_terminal

from llm.checkpoint.manifest import Manifest, Parameter
from llm.checkpoint.saver import save
from llm.checkpoint.slices import KINDS, Slice
from llm.checkpoint.template import write_template
from llm.config import ModelConfig
from llm.dist import World
from llm.generate.load import load_run
from llm.log import UserError
from llm.model.init import build_model
from llm.tokenizer.train import train_bpe

LAUNCH = Path(__file__).parents[2] / "launch" / "generate.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of steps 1 and 2, whose seeds are their steps."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    tokenizer = train_bpe(["plain bytes"], vocab_size=256).tokenizer
    for step in (1, 2):
        save_model(folder, step, build_model(settled_config(tokenizer), seed=step), tokenizer)
    return folder


def settled_config(tokenizer) -> ModelConfig:
    cfg = ModelConfig(n_layers=1, d_model=32, n_heads=4, d_ff=48, seq_len=16, tie_embeddings=True, init_std=0.3)
    return cfg.with_vocab(tokenizer.vocab_size)


def save_model(folder, step, model, tokenizer, template=None):
    weights = list(model.named_parameters())
    slices = [Slice(name, kind, 0, w.detach().flatten()) for name, w in weights for kind in KINDS]
    manifest = Manifest(
        run_id="r", attempt=1, step=step, tokens_seen=0, parent=None, world_size=1, global_rows=1,
        config={"model": model.cfg.model_dump(mode="json")}, tokenizer_fingerprint=tokenizer.fingerprint, ledger={}, chain="", engine={},
        versions={}, metrics={}, epoch_end=False, files=[], state_hash=0,
        params=[Parameter(name=name, shape=list(w.shape)) for name, w in weights],
    )  # fmt: skip

    def add_tokenizer(temporary: Path) -> None:
        (temporary / "tokenizer").mkdir()
        tokenizer.save(temporary / "tokenizer")
        if template:
            write_template(temporary, template.to_json())

    folder.mkdir(exist_ok=True)
    save(World(), folder, manifest, slices, add_tokenizer)


@pytest.mark.parametrize(("step", "seed"), [(None, 2), (1, 1)])
def test_a_loaded_run_is_the_model_that_was_saved(run, step, seed):
    model, tokenizer, checkpoint = load_run(run, step)
    saved = build_model(settled_config(tokenizer), seed=seed)
    tokens = torch.arange(16)[None]
    assert checkpoint.manifest.step == seed
    assert torch.equal(model(tokens), saved(tokens))
    assert model.head.weight is model.embed.weight


def test_bf16_is_for_weights_and_leaves_rotary_angles_exact(run):
    model, tokenizer, _ = load_run(run, dtype=torch.bfloat16)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.cos, build_model(settled_config(tokenizer), 1).cos)


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no checkpoint here"):
        load_run(tmp_path / "nowhere")


def generate(*words, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, LAUNCH, *map(str, words)], capture_output=True, text=True, input=stdin, timeout=120)


def test_the_command_continues_the_prompt_and_repeats_itself_with_the_same_seed(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("once upon")
    words = ["--max-tokens", 8, "--seed", 3, "--device", "cpu", "--top_k", 5]
    by_flag, by_file = generate(run, "--prompt", "once upon", *words), generate(run, "--prompt-file", tmp_path / "prompt.txt", *words)
    assert by_flag.returncode == 0, by_flag.stderr
    assert by_flag.stdout == by_file.stdout
    first, text = by_flag.stdout.split("\n", 1)
    assert "step 2" in first and "seed 3" in first
    assert text.startswith("once upon") and len(text) > len("once upon\n")


def test_no_text_steers_the_terminal(run, tmp_path):
    evil = "\x1b]0;evil\x07"
    (tmp_path / "prompts.txt").write_text(evil)
    seen = on_a_terminal(str(LAUNCH), str(run), "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "2", "--device", "cpu")
    assert "␛]0;evil␇".encode() in seen and evil.encode() not in seen


def prompts(**given) -> list[str]:
    """What the script understands as its prompts."""
    script = runpy.run_path(str(LAUNCH))
    return script["prompts"](SimpleNamespace(**{"interactive": False, "prompt": None, "prompt_file": None, "prompts": None} | given))


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_prompt_is_a_line_whatever_characters_it_holds(tmp_path, name):
    texts = ["a\u2028b", "c\x85\x0cd"]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts] if name == "p.jsonl" else texts
    (tmp_path / name).write_text("\r\n\r\n".join(lines), encoding="utf-8", newline="")
    assert prompts(prompts=tmp_path / name) == texts


def test_half_a_character_in_a_prompt_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('"\\ud800"\n')
    for given in ({"prompts": tmp_path / "p.jsonl"}, {"prompt": os.fsdecode(b"caf\xe9")}):
        with pytest.raises(UserError, match="cannot be read as a prompt"):
            prompts(**given)


def test_nonstop_keeps_in_its_output_what_ctrl_c_interrupts(run, tmp_path):
    words = [sys.executable, LAUNCH, run, "--prompt", "once", "--nonstop", "--temp", 0, "--device", "cpu", "--output", tmp_path / "out.txt"]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE)
    seen = b""
    while len(seen) < 200:
        seen += os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    seen += process.stdout.read()
    assert process.wait(60) == 0
    kept = (tmp_path / "out.txt").read_bytes()
    assert kept.startswith(b"once") and len(kept) > 50 and kept in seen


def test_a_reader_that_has_gone_and_a_terminal_without_a_letter_get_no_traceback(run):
    words = [sys.executable, LAUNCH, run, "--prompt", "é", "--device", "cpu", "--nonstop"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert any(b"?" in line for line in process.stdout), process.stderr.read()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE and process.stderr.read() == b""


@pytest.mark.parametrize(("script", "words", "asked"), [("generate.py", ["--interactive"], "text> "), ("chat.py", [], "you> ")])
def test_a_key_that_is_no_utf8_does_not_end_a_session(run, script, words, asked):
    words = [sys.executable, LAUNCH.with_name(script), run, *words, "--max-tokens", "2", "--device", "cpu"]
    done = subprocess.run(words, input=b"caf\xe9\nagain\n", capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().count(asked) == 3, done.stderr


def test_a_cut_prompt_is_said(run):
    result = generate(run, "--prompt", "x" * 20, "--max-tokens", 1, "--device", "cpu")
    assert "the prompt has 20 tokens, the model sees 16: only the last 16 are used" in result.stdout


@pytest.mark.parametrize(("words", "said"), [
    (["--prompt", ""], "the prompt is empty"), (["--prompt-file", "no-such-file"], "no-such-file: cannot be read"),
    (["--prompt", "a", "--temp", "-1"], "temperature is -1"), (["--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0"),
    (["--prompt", "a", "--step", "7"], "no checkpoint of step 7"),
    (["--prompt", "a", "--device", "cuda:99"], "--device cuda:99: cannot be used here"),
])  # fmt: skip
def test_a_mistake_gets_one_paragraph_and_exit_code_2(run, words, said):
    result = generate(run, *words)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_help_answers_without_loading_torch():
    code = f"import sys, runpy; sys.argv = ['generate.py', '--help']\ntry: runpy.run_path({str(LAUNCH)!r}, run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--prompt-file" in result.stdout
