"""The commands of the pages on data, fine-tuning and planning name scripts and options that there are."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page, at_least", [("data.md", 10), ("finetune.md", 6), ("plan.md", 4)])
def test_every_command_on_the_page_names_a_script_and_options_that_exist(page, at_least):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("python ")]
    assert len(commands) > at_least
    helps = {}
    for _, script, *words in commands:
        wanted = [word.split("=")[0] for word in words if word.startswith("--")]
        path = [script, words[0]] if script.endswith("ledger.py") else [script]
        if tuple(path) not in helps:
            done = subprocess.run([sys.executable, *path, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            helps[tuple(path)] = done.stdout
        for option in wanted:
            assert re.search(rf"{option}\b", helps[tuple(path)]), (script, option)
