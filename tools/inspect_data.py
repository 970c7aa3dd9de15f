"""Look at raw text, a shard or a dataset folder: counts, lengths, repeated documents, and windows of the text as a model meets it.

python tools/inspect_data.py data/raw/pystdlib.jsonl
python tools/inspect_data.py data/pystdlib --tokenizer data/tokenizers/pystdlib-4k --png lengths.png --verify
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, result


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("path", type=Path, help="a file or folder of text, a dataset folder, or a shard's .bin")
    parser.add_argument("--tokenizer", metavar="PATH", help="to see text instead of token ids")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="how many windows to show (default: %(default)s)")
    parser.add_argument("--window-size", type=int, metavar="N", help="tokens (default: 128) or characters (default: 600) of each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the windows of shards (default: %(default)s)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the lengths of documents")
    parser.add_argument("--verify", action="store_true", help="read every byte of the shards and hold it against its hash")
    parser.add_read_options()
    args = parser.parse_args()

    from llm.corpus import look as look_at
    from llm.corpus.options import read_options

    tokenized = look_at.is_tokenized(args.path)
    if args.verify and not tokenized:
        raise UserError(f"{args.path}: --verify is for shards, and this is raw text, which carries no hash. Give a dataset folder or a .bin.")
    if args.verify:
        result(f"{args.path}: {look_at.verify(args.path):,} tokens read, every hash is right")
    if tokenized:
        look = look_at.look_at_shards(args.path, args.tokenizer, args.windows, args.window_size or 128, args.seed)
    else:
        look = look_at.look_at_text(args.path, read_options(args), args.windows, args.window_size or 600)
    for fact in look.facts:
        result(fact)
    if not len(look.lengths):
        raise UserError(f"{args.path}: holds no document that is not empty.")
    result(f"repeated documents: {look.repeated:,} of {len(look.lengths):,}")
    result(f"\n{look.unit} per document: mean {look.lengths.mean():,.1f}, longest {look.lengths.max():,}")
    result("\n".join(look_at.histogram(look.lengths)))
    if look.windows and tokenized and not args.tokenizer:
        result("\n(token ids; --tokenizer PATH shows the text)")
    for window in look.windows:
        result(f"\n{window}")
    if args.png:
        try:
            look_at.draw(look, str(args.path.name), args.png)
        except (OSError, ValueError) as error:  # a suffix that names no kind of picture is a ValueError
            raise UserError(f"--png {args.png}: cannot be written ({error}). Give a file.png in a folder that is there.") from None
        result(f"{args.png}: drawn")


if __name__ == "__main__":
    cli.run(main)
