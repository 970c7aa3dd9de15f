"""A newcomer's walk: every command of README and docs, typed as it is printed, in a fresh copy of the project with small data and small models.

A command that cannot be run here says so on its page, in a comment that begins with `needs`: a network, a cluster, a GPU, a long time.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import documented
import pytest
import yaml
from documented import PAGES, ROOT
from eval.test_harness import write_tasks
from eval.tiny import tokenizer, write_mmlu

pytestmark = [pytest.mark.skipif(not os.environ.get("TORTURE"), reason="in make torture"), pytest.mark.timeout(300)]
LIMIT_S, STOP_AFTER_S = 240, 15
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
LONG = ("make ", "pip install")
"""What the walk's own surroundings stand in for: this suite runs, and everything is installed."""
UNTIL_STOPPED = ("--interactive", "--nonstop", "launch/chat.py", "tensorboard")
ORDER = ["README.md", "docs/data.md", "docs/finetune.md"]
"""The pages that begin; what README does with the runs of the other two comes after them."""


def place(command: documented.Command) -> tuple:
    page = command.where.split(":")[0]
    is_later = page == "README.md" and ("sft-toy" in command.text or "my-llm" in command.text)
    return (ORDER.index(page) if page in ORDER and not is_later else len(ORDER), [str(p.relative_to(ROOT)) for p in PAGES].index(page))


def commands() -> list[documented.Command]:
    """Each once, in the order of the walk."""
    found = {}
    for command in sorted(documented.blocks(), key=place):
        if not command.comment.startswith("needs") and not command.text.startswith(LONG):
            found.setdefault(command.text, command)
    return list(found.values())


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project as `git clone` gives it, its models small, with the texts of one's own that the pages speak of."""
    here = tmp_path_factory.mktemp("walk")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, here / name)
    for name in ("toy", "sft-toy", "my-llm"):
        shrink(here / "configs" / f"{name}.yaml")
    write_texts(here)
    return here


def shrink(path: Path) -> None:
    config, name = yaml.safe_load(path.read_text()), path.stem
    config["model"] |= {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "d_ff": 128}
    config["train"] |= {"warmup_steps": 2} | ({"total_step_budget": 30} if name == "toy" else {})
    if name == "my-llm":
        config["train"] |= {"batch_size": 1, "batch_tokens": 2048}
    path.write_text(yaml.safe_dump(config))


def write_texts(here: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    chat = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A list holds things in their order."}]
    files = {
        **{f"my-texts/{n}.txt": text for n, text in enumerate(texts)},
        "more-texts/a.txt": texts[0].replace("json", "tally"),
        "my-text.txt": texts[1],
        "test-set.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in (texts[1][200:900], "Something else.")),
        "start.txt": "def ",
        "prompts.txt": "def \nclass \n",
        "chats.jsonl": (json.dumps({"messages": chat}) + "\n") * 40,
        "instructions.jsonl": (json.dumps({"instruction": chat[0]["content"], "output": chat[1]["content"]}) + "\n") * 40,
        "questions.jsonl": (json.dumps({"question": chat[0]["content"], "answer": chat[1]["content"]}) + "\n") * 40,
    }
    for name, text in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, encoding="utf-8")
    (here / "path/to/c4/en").mkdir(parents=True)
    with gzip.open(here / "path/to/c4/en/c4-train.00000-of-00001.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n" for text in texts)
    write_mmlu(here / "data/raw/mmlu", ["anatomy", "world_religions"], shots=5)
    (here / "data/tasks").mkdir()
    write_tasks(here / "data/tasks")
    little_llama(here / "models/TinyLlama-1.1B")


def little_llama(folder: Path) -> None:
    """As the hub has them, but small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer().vocab_size, **size)).save_pretrained(folder)
    tokenizer().save(folder)


def test_the_quick_start_runs(copy):
    """`make quickstart` without its installation, and shorter."""
    makefile = (copy / "Makefile").read_text()
    (copy / "Makefile").write_text(makefile.replace("quickstart: install", "quickstart:").replace("24M", "400k"))
    run(copy, "make quickstart MINUTES=0.1")


@pytest.mark.parametrize("command", commands(), ids=lambda c: c.where)
def test_a_command_does_what_its_page_says(copy, command):
    assert command.text, command.where
    if "checkpoints/other" in command.text:
        shutil.copytree(copy / "checkpoints/toy", copy / "checkpoints/other", dirs_exist_ok=True)
    if not shutil.which(command.text.split()[0], path=PATH):
        pytest.skip(f"no {command.text.split()[0]} here")
    run(copy, command.text, stop=any(word in command.text for word in UNTIL_STOPPED))


def run(folder: Path, text: str, stop: bool = False) -> None:
    env = os.environ | {"HOME": str(folder), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    env |= {"PATH": PATH, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with open(folder / "walk.log", "w+") as log:
        words = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(["bash", "-ec", text], cwd=folder, env=env, **words)
        try:
            code = process.wait(STOP_AFTER_S if stop else LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(30) and not stop
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert code == 0, f"{text}\n{(folder / 'walk.log').read_text()[-3000:]}"
