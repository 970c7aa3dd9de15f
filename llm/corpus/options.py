"""How text is read: what a person may say about it on every command line."""

from argparse import Namespace
from dataclasses import dataclass

from llm.corpus.conversations import CHATML, Template, load_template
from llm.log import UserError

BLANK_LINES = "blank-lines"


@dataclass(frozen=True)
class ReadOptions:
    separator: str | None = None
    """What stands between the documents of a .txt file, or BLANK_LINES; None: each file is one document."""
    text_field: str | None = None
    """The field that holds the text; None: what the shape of the records suggests."""
    format: str | None = None
    """A name of READERS, of SHAPES, or both with a comma; None: recognised."""
    fields: tuple[tuple[str, str], ...] = ()
    """(our name, theirs): fields that are to be read under another name."""
    template: Template = CHATML


def separator_from(argument: str | None) -> str | None:
    r"""The separator that a command line means: a shell passes \n as two characters."""
    return argument.replace("\\n", "\n").replace("\\t", "\t") if argument else None


def read_options(args: Namespace, template: Template | None = None) -> ReadOptions:
    """The options of a command line that `add_read_options` has extended. Raises UserError for those that nothing can be read with.

    `template`: where the command line gives none; None: ChatML.
    """
    from llm.corpus.formats import check_format

    check_format(args.format)
    pairs = tuple(tuple(pair.split("=", 1)) for pair in args.field)
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise UserError(f"--field {wrong[0][0]} does not name two fields. Write --field OURS=THEIRS, for example --field response=reply.")
    template = load_template(args.template) if args.template else template or CHATML
    return ReadOptions(separator_from(args.separator), args.text_field, args.format, pairs, template)
