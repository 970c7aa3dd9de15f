"""Command lines: one parser for every script, and the place where a UserError becomes its exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from logging import ERROR

from llm.log import MISTAKE, UserError, show, tag, terminal

NEEDS_A_PERSON = 3  # training cannot go on by itself, and a retry would end the same way
RETRY = 75  # EX_TEMPFAIL of sysexits.h: a hang or a lost rank
__all__ = ["MISTAKE", "NEEDS_A_PERSON", "RETRY", "Parser", "amount", "parser", "run"]


class Parser(argparse.ArgumentParser):
    """Takes `--steps-today` and `--steps_today` alike, overrides between flags, and what every script has about its output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        group = self.add_argument_group("what is shown")
        level = group.add_mutually_exclusive_group()  # suppressed: else a subcommand's defaults would undo what was said before it
        level.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="results, warnings and errors only")
        level.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="details too")
        group.add_argument("--no-color", action="store_true", default=argparse.SUPPRESS, help="no colours, as with NO_COLOR=1")

    def parse_args(self, args=None, namespace=None):
        words = [_dashed(word) for word in (sys.argv[1:] if args is None else args)]
        has_overrides = any(action.dest == "overrides" for action in self._actions)  # else only the first run of them would be taken
        given = self.parse_intermixed_args(words, namespace) if has_overrides else super().parse_args(words, namespace)
        show(quiet="quiet" in given, verbose="verbose" in given)
        if "no_color" in given:
            os.environ["NO_COLOR"] = "1"  # rich and child processes look there too
        return given

    def add_config(self) -> None:
        """Add the arguments that choose and change a run's config."""
        source = self.add_mutually_exclusive_group()
        source.add_argument("--config", metavar="FILE", help="the run, as YAML or JSON")
        source.add_argument("--model", metavar="NAME", help="short for --config configs/NAME.*")
        self.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the config")

    def add_read_options(self) -> None:
        """Add what may be said about how text is read; `llm.corpus.options.read_options` understands it."""
        group = self.add_argument_group("how text is read")
        group.add_argument("--format", metavar="NAME", help="instead of what is recognised: csv, alpaca, messages, ... or two: csv,alpaca")
        group.add_argument("--separator", metavar="S", help="divides .txt files into documents, for example \\n\\n, or the word blank-lines")
        group.add_argument("--text-field", metavar="NAME", help="the field or column that holds the text (default: recognised)")
        group.add_argument("--field", action="append", default=[], metavar="OURS=THEIRS", help="a field's other name: --field response=reply")
        group.add_argument("--template", metavar="FILE", help="how conversations are written, as YAML (default: ChatML)")

    def add_dtype(self, default: str) -> None:
        """Add what a trained model's weights are read in."""
        told = "of the weights; auto: bf16 where this machine is faster in it, else fp32 (%(default)s)"
        self.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default=default, help=told)

    def add_generation_options(self, max_tokens: int) -> None:
        """Add what chooses a trained model and how it writes."""
        self.add_argument("run", metavar="RUN", help="a run's folder, or that of one checkpoint")
        self.add_argument("--step", type=int, metavar="N", help="use the checkpoint of this step; left out: the newest")
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps (%(default)s: a GPU if there is one)")
        self.add_dtype("auto")
        group = self.add_argument_group("how it writes")
        group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="stop after so many new tokens (%(default)s)")
        group.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature; 0 takes the likeliest token (%(default)s)")
        group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
        group.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that together hold probability P")
        group.add_argument("--min-p", type=float, metavar="P", help="choose among tokens at least P times as likely as the likeliest")
        group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: say less often what was said (%(default)s)")
        group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text; left out: another text each time")


def parser(description: str) -> Parser:
    """A parser whose help keeps the description's line breaks."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave with its exit code; one paragraph and its own code (mostly 2) for a UserError, 130 for Ctrl-C."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names of files may be any bytes, and not every terminal knows every character
    try:
        code = main() or 0
    except UserError as error:
        if not error.told:
            stream = sys.stderr if terminal() is sys.stdout else terminal()
            print(f"{tag(ERROR, stream)}{error}", file=stream, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=terminal(), flush=True)
        code = 130
    except BrokenPipeError:  # `| head`: whoever read has enough, and what is left in buffers can go nowhere
        os._exit(128 + signal.SIGPIPE)
    _leave(code)


def _leave(code: int) -> None:
    """End the process. With torch loaded at once: threads of its libraries may abort it while the interpreter is taken down, after all went well."""
    if "torch" not in sys.modules:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr, terminal()):
        with suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


def amount(text: str) -> int:
    """Type of an argument that counts bytes or tokens: 500000, 500k, 24M, 2G (powers of 1,000)."""
    number, factor = text[:-1], {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower())
    try:
        return int(float(number) * factor) if factor else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; write 500000, 500k, 24M or 2G") from None
