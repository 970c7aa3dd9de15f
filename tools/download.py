"""Collect a named dataset as raw text: from the Hugging Face hub, from this machine, or from files that are at hand.

python tools/download.py --list
python tools/download.py --dataset pystdlib
python tools/download.py --dataset story --sample 1%
python tools/download.py --dataset knowledge --from train-v1.1.json
"""

import argparse
from pathlib import Path

from llm import cli
from llm.log import UserError, log, result


def main() -> None:
    parser = cli.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", metavar="NAME", help="one of --list")
    what.add_argument("--list", action="store_true", help="the datasets, with their size and licence")
    parser.add_argument("--from", dest="inputs", nargs="+", metavar="PATH", help="its files, if they are here already; nothing is downloaded")
    parser.add_argument("--sample", type=_share, default=1.0, metavar="X", help="this share of it, as 1%% or 0.01 (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: data/raw/DATASET.jsonl")
    parser.add_argument("--max-bytes", type=cli.amount, metavar="N", help="no more text than this (default: 16M for pystdlib)")
    parser.add_argument("--rewrite-url", metavar="URL", help="an OpenAI-compatible server that rewrites answers as whole sentences")
    parser.add_argument("--rewrite-model", default="default", metavar="NAME", help="the model there (default: %(default)s)")
    args = parser.parse_args()

    from llm.corpus.recipes import RECIPES

    if args.list:
        _list(RECIPES)
        return
    if args.dataset not in RECIPES:
        raise UserError(f"--dataset {args.dataset}: there is no such dataset. Choose one of {', '.join(RECIPES)}.")
    out = args.out or Path("data/raw") / f"{args.dataset}.jsonl"
    if out.exists():
        log.info(f"{out}: is there already; delete it to collect it again")
        return
    from llm.corpus.collect import collect
    from llm.corpus.rewrite import Rewriter

    rewrite = Rewriter(args.rewrite_url, args.rewrite_model, out.with_name(f"{out.stem}.answers.jsonl")) if args.rewrite_url else None
    n_docs, n_bytes = collect(args.dataset, out, args.max_bytes, args.inputs, args.sample, rewrite)
    log.info(f"{out}: {n_docs:,} documents, {n_bytes:,} bytes of text")


def _share(text: str) -> float:
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share; write 1% or 0.01")
    return share


def _list(recipes: dict) -> None:
    for name, recipe in recipes.items():
        result(f"{name:12} {recipe.size:>7}  {recipe.licence:24}  {recipe.about}")


if __name__ == "__main__":
    cli.run(main)
