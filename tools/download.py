"""Collect a named dataset as raw text.

python tools/download.py --dataset pystdlib
"""

from pathlib import Path

from llm import cli
from llm.corpus.recipes import RECIPES, collect
from llm.log import log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--dataset", required=True, choices=sorted(RECIPES), help="pystdlib: this Python's own sources")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: data/raw/DATASET.jsonl")
    parser.add_argument("--max-bytes", type=cli.amount, default=16_000_000, metavar="N", help="no more text than this (default: %(default)s)")
    args = parser.parse_args()

    out = args.out or Path("data/raw") / f"{args.dataset}.jsonl"
    if out.exists():
        log.info(f"{out}: is there already; delete it to collect it again")
        return
    collected = collect(args.dataset, out, args.max_bytes)
    log.info(f"{out}: {collected.docs:,} documents, {collected.bytes:,} bytes of text")


if __name__ == "__main__":
    cli.run(main)
