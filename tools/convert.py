"""Convert text files of any kind into one .txt, .jsonl, .parquet or .arrow file, cleaned on the way if you say so.

python tools/convert.py data/raw/pystdlib.jsonl --out data/raw/pystdlib.parquet --dedup --min-chars 200
"""

import re
from pathlib import Path

from llm import cli
from llm.log import UserError, log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files of text, or folders that hold them")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="its suffix says the kind: .txt .jsonl .parquet .arrow")
    parser.add_argument("--out-separator", default="<|endoftext|>", metavar="S", help="between the documents of a .txt (default: %(default)s)")
    group = parser.add_argument_group("cleaning, in this order")
    group.add_argument("--repair-unicode", action="store_true", help="misread UTF-8, control characters, line ends; composed characters")
    group.add_argument("--drop-lines", action="append", default=[], metavar="REGEX", help="leave out lines in which it is found")
    group.add_argument("--min-chars", type=int, default=0, metavar="N", help="drop shorter documents")
    group.add_argument("--max-chars", type=int, metavar="N", help="drop longer documents")
    group.add_argument("--dedup", action="store_true", help="drop documents that came before, letter by letter")
    parser.add_read_options()
    args = parser.parse_args()

    from llm.corpus.cleaning import Cleaning
    from llm.corpus.convert import convert
    from llm.corpus.options import read_options, separator_from
    from llm.corpus.read_all import read_all

    for pattern in args.drop_lines:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--drop-lines {pattern!r} is no regular expression: {error}.") from None
    cleaning = Cleaning(args.repair_unicode, tuple(args.drop_lines), args.min_chars, args.max_chars, args.dedup)
    n_docs = convert(cleaning(read_all(args.inputs, read_options(args))), args.out, separator_from(args.out_separator))
    for what, number in cleaning.counts.items():
        if number:
            log.info(f"{number:>12,} {what}")
    log.info(f"{args.out}: {n_docs:,} documents, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main)
