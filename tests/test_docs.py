"""The commands on the pages name scripts and options that there are, and what the pages point to is there."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPT = re.compile(r"(launch|tools|benchmarks)/\w+\.py")


@functools.cache
def help_of(*words: str) -> str:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(page: Path) -> list[list[str]]:
    """Our scripts' commands in the page's bash blocks, from the script on."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = [next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None) for words in lines]
    return [words[start:] for words, start in zip(lines, starts, strict=True) if start is not None]


def test_the_pages_have_commands_to_check():
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert counts["data.md"] > 10 and counts["finetune.md"] > 6 and counts["README.md"] > 12 and counts["seeing.md"] > 2


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_on_the_page_names_a_script_and_options_that_exist(page):
    for script, *words in commands(page):
        text = help_of(script, words[0]) if script.endswith("ledger.py") else help_of(script)
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", text), (script, option)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_the_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
