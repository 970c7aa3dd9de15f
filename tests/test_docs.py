"""What the pages show and point to is there: commands that can be typed as they stand (tests/test_walk.py does), files behind links."""

import re
import runpy
import sys
from pathlib import Path

import documented
import pytest
from documented import PAGES, ROOT

from llm.cli import Parser
from llm.config import load_config

BLOCKS, MENTIONS = documented.blocks(), documented.mentions()


class Parsed(Exception):
    pass


@pytest.fixture
def parse(monkeypatch):
    """The namespace that a script makes of its arguments, without what it would do then."""
    original = Parser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    def parse(script: str, arguments: list[str]):
        monkeypatch.setattr(sys, "path", [str(ROOT / Path(script).parent), *sys.path])
        main = runpy.run_path(str(ROOT / script))["main"]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            main()
        return parsed.value.args[0]

    return parse


def test_the_pages_show_commands():
    assert len(BLOCKS) > 40 and len(MENTIONS) > 40


@pytest.mark.parametrize("command", [c for c in [*BLOCKS, *MENTIONS] if c.script], ids=lambda c: c.where)
def test_a_command_shown_is_one_that_its_script_takes(parse, command):
    assert (ROOT / command.script).is_file(), f"{command.where}: {command.text}"
    try:
        options = parse(command.script, command.arguments)
    except SystemExit:
        pytest.fail(f"{command.where}: {command.text}")
    config = getattr(options, "config", None)
    if config and (ROOT / config).is_file():
        load_config(ROOT / config, options.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_the_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
