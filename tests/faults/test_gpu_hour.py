"""benchmarks/gpu_hour.sh: in small on a CPU, so that what it calls is there when a GPU is."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from counts import torture
from test_commands import ROOT, command

SCRIPT = ROOT / "benchmarks/gpu_hour.sh"
CHECK = re.compile(r"^ +check \d+ (\w+) (\w+)", re.MULTILINE)


def hour(run: str, out: Path, timeout_s: float = 60, **environment: str) -> list[dict]:
    variables = {"TINY": "1", "OUT": str(out), "PY": sys.executable} | environment
    done = command("bash", SCRIPT, run, timeout_s=timeout_s, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def checks_of(run: str) -> list[str]:
    """The checks of A or B, in order; `environment` once."""
    part = SCRIPT.read_text().partition(f"\n{run})\n")[2].partition(";;")[0]
    names = [name for _, name in CHECK.findall(part)]
    return names[1:] if run == "A" else names


def test_every_check_that_the_script_names_is_one_of_its_files():
    named = CHECK.findall(SCRIPT.read_text())
    assert len(named) > 15
    for file, name in named:
        tree = ast.parse((ROOT / f"benchmarks/{file}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("run", ["A", "B"])
def test_a_check_that_dies_or_has_no_time_left_is_a_finding_and_the_others_come(tmp_path, run):
    n = len(checks_of(run)) + (run == "A")  # environment is tried in two ways
    died = hour(run, tmp_path / "died", PY="false")
    assert [found["check"] for found in died] == ["ended with code 1"] * n
    late = hour(run, tmp_path / "late", MINUTES="0")
    assert [found["check"] for found in late] == ["left out"] * n


@torture
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("run", ["A", "B"])
def test_the_whole_hour_in_small_finds_nothing_wrong(tmp_path, run):
    found = hour(run, tmp_path, timeout_s=1400, MINUTES="23")
    wrong = [f for f in found if "failed" in f or f.get("verdict") == "WRONG" or " " in f["check"]]
    assert wrong == []
    assert [f["of"] for f in found if f["check"] == "done"] == checks_of(run)
