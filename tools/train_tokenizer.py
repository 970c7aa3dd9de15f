"""Train a byte-level BPE tokenizer on text.

python tools/train_tokenizer.py data/raw/pystdlib.jsonl --vocab-size 4096 --out data/tokenizers/pystdlib
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files of text, or folders that hold them")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where tokenizer.json goes")
    parser.add_argument("--vocab-size", type=int, default=4096, help="plain tokens; 4 special ones on top (default: %(default)s)")
    parser.add_argument("--sample-bytes", type=int, default=1 << 30, metavar="N", help="train on no more text than this (default: 1 GiB)")
    parser.add_read_options()
    parser.add_argument(
        "--force", action="store_true", help="replace a tokenizer that datasets were made with: these and the models trained on them go on "
        "needing the old one, and text tokenized with the new one will not fit them"
    )  # fmt: skip
    parser.add_argument("--compare", type=Path, metavar="PATH", help="another tokenizer to measure beside this one, for example GPT-2's files")
    args = parser.parse_args()

    from llm.corpus.options import read_options
    from llm.corpus.read_all import read_all
    from llm.corpus.token_report import report_tokens
    from llm.tokenizer import load_tokenizer
    from llm.tokenizer.train import train_bpe

    options = read_options(args)
    other = load_tokenizer(args.compare) if args.compare else None
    documents = read_all(args.inputs, options)
    trained = train_bpe((document.plain_text(options.template) for document in documents), args.vocab_size, args.sample_bytes)
    log.info(f"{trained.tokenizer.vocab_size:,} tokens from {trained.sample_bytes:,} bytes of text; "
             f"{trained.bytes_per_token:.2f} bytes per token on {trained.measured_on}")  # fmt: skip
    _save(trained.tokenizer, args.out, args.force)
    report_tokens(read_all(args.inputs, options), options.template, trained.tokenizer, other)


def _save(tokenizer, folder: Path, force: bool) -> None:
    from llm.corpus.tokenizer_use import datasets_made_with
    from llm.tokenizer import load_tokenizer

    if (folder / "tokenizer.json").exists():
        old = load_tokenizer(folder)
        if old.fingerprint == tokenizer.fingerprint:
            log.info(f"{folder}: holds this very tokenizer already (fingerprint {old.fingerprint[:16]})")
            return
        datasets = datasets_made_with(folder, old.fingerprint)
        invalid = f"datasets made with it ({', '.join(map(str, datasets))}) and the models trained on them"
        if datasets and not force:
            raise UserError(
                f"{folder}: holds another tokenizer (fingerprint {old.fingerprint[:16]}), and {invalid} need it. Choose another --out, or "
                f"give --force: they would then be refused by everything that reads them with the new tokenizer."
            )
        if datasets:
            log.warning(f"{folder}: replaced; the {invalid} no longer fit")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another --out.") from None
    log.info(f"{folder / 'tokenizer.json'}: written, fingerprint {tokenizer.fingerprint[:16]}")


if __name__ == "__main__":
    cli.run(main)
