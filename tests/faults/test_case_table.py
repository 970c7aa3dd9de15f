"""docs/reliability.md names tests: they exist, and each case has its row."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs/reliability.md").read_text(encoding="utf-8")
CASES = range(1, 61)


def test_every_test_that_the_page_names_exists():
    there = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    named = re.findall(r"`(test_\w+)(…?)`", PAGE)
    missing = [name for name, cut in named if not (any(t.startswith(name) for t in there) if cut else name in there)]
    assert len(named) > 60 and missing == []


def test_every_case_has_its_row():
    rows = re.findall(r"^\| ((?:\d+★? ?)+)\| .+ \| .+ \|$", PAGE, re.M)
    assert sorted(int(n) for row in rows for n in re.findall(r"\d+", row)) == list(CASES)
