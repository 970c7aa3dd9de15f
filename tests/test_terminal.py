"""What a terminal is shown: colours, levels, time left. The same flags for every script."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")])
COLOURED = b"\x1b[1;31merror: \x1b[0m"


def on_a_terminal(*words: str, **environment: str) -> bytes:
    """Everything that a person would see."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")} | {"TERM": "xterm"} | environment
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    process.wait(timeout=60)
    return seen


MISTAKE = ("tools/download.py", "--dataset", "none")


@pytest.mark.parametrize(
    ("words", "environment", "coloured"),
    [((), {}, True), (("--no-color",), {}, False), ((), {"NO_COLOR": "1"}, False), ((), {"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_and_can_be_turned_off(words, environment, coloured):
    seen = on_a_terminal(*MISTAKE, *words, **environment)
    assert b"error: " in seen and (COLOURED in seen) == coloured and (b"\x1b" in seen) == coloured, seen


def test_a_pipe_gets_no_colours():
    done = subprocess.run([sys.executable, *MISTAKE], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ")


LEVELS = """
import sys
from llm import cli
from llm.log import log, progress, result
parser = cli.parser("x")
commands = parser.add_subparsers()
commands.add_parser("sub")
parser.parse_args()
for level in ("debug", "info", "warning", "error"):
    getattr(log, level)(f"a {level}")
result("a result")
with progress(2, "working", "parts") as bar:
    bar.advance()
    log.warning("meanwhile")
"""


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), ["info", "warning", "error", "result"]),
        (("--quiet",), ["warning", "error", "result"]),
        (("--verbose",), ["debug", "info", "warning", "error", "result"]),
        (("--quiet", "sub"), ["warning", "error", "result"]),
        (("sub", "--quiet"), ["warning", "error", "result"]),
    ],
)
def test_quiet_leaves_results_and_warnings_and_verbose_adds_details(words, shown):
    seen = on_a_terminal("-c", LEVELS, *words, PYTHONPATH=str(ROOT), NO_COLOR="1").decode()
    assert [word for word in ("debug", "info", "warning", "error", "result") if f"a {word}" in seen] == shown
    assert ("working" in seen) == ("info" in shown), "a bar is chatter too"


@pytest.mark.parametrize("words", [(), ("--quiet",), ("--no-color",)])
def test_a_warning_beside_a_live_bar_is_coloured_like_any_other(words):
    seen = on_a_terminal("-c", LEVELS, *words, PYTHONPATH=str(ROOT))
    assert (b"\x1b[1;33mwarning: \x1b[0mmeanwhile" in seen) == ("--no-color" not in words), seen
    assert b"warning: " in seen and b"meanwhile" in seen


def test_every_script_has_the_same_flags_and_refuses_two_levels_at_once():
    for script in SCRIPTS:
        assert "cli.parser(" in script.read_text(), f"{script}: its flags come from one place"
    done = subprocess.run([sys.executable, *MISTAKE, "--quiet", "--verbose"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not allowed with" in done.stderr


@pytest.mark.parametrize("words", [("tools/plan_run.py", "--model", "gpt-1b", "--gpus", "8", "--gpu", "h100"), ("tools/download.py", "--list")])
def test_quiet_leaves_what_the_command_was_asked_for(words):
    loud, quiet = (
        subprocess.run([sys.executable, *words, *flag], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout for flag in ((), ("--quiet",))
    )
    assert quiet and quiet == loud, "neither has anything else to say"


def test_a_reader_that_has_enough_ends_a_script_without_a_traceback():
    script = "from llm import cli\ndef main():\n  while True: print('a' * 1000)\ncli.run(main)"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -c 10; echo " ${PIPESTATUS[0]}"', sys.executable, script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("aaaaaaaaaa 141\n", "")


def test_long_work_that_has_not_come_to_anything_yet_says_nothing(capsys, monkeypatch):
    from llm.log import progress

    clock = iter([100.0, 120.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress(1000, "reading", "bytes") as bar:
        bar.advance(0)
    assert capsys.readouterr().out == ""


def test_a_script_without_a_log_file_keeps_only_its_last_lines():
    told = "from llm import log\nfor i in range(5000): log.log.debug(i)\nprint(len(log._early.buffer))"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1000\n", done.stderr


def test_lines_about_long_work_say_how_much_time_is_left(capsys, monkeypatch):
    from llm.log import progress

    clock = iter([100.0, 120.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress(1000, "reading", "bytes") as bar:
        bar.advance(250)
    assert capsys.readouterr().out == "reading: 250 of 1,000 bytes, 1:00 left\n"
