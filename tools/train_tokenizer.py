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
        "--force", action="store_true", help="replace a tokenizer that datasets were made with, or that this script did not make: datasets "
        "and models made with it go on needing the old one, and text tokenized with the new one will not fit them"
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
    """Raises UserError; then the tokenizer that is in `folder`, if any is, is the old one, whole."""
    from llm.corpus.tokenizer_use import begin_note

    old = _fingerprint_in(folder, force)
    if old == tokenizer.fingerprint:
        log.info(f"{folder}: holds this very tokenizer already (fingerprint {old[:16]})")
        return
    needed_by = _users(folder, old) if old else None
    if needed_by and not force:
        raise UserError(
            f"{folder}: holds another tokenizer (fingerprint {old[:16]}), and {needed_by} need it. "
            f"Choose another --out, or give --force: they would then be refused by everything that "
            f"reads them with the new tokenizer."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin_note(folder)  # first: a tokenizer without its note would pass for somebody else's
        tokenizer.save(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another --out.") from None
    log.info(f"{folder / 'tokenizer.json'}: written, fingerprint {tokenizer.fingerprint[:16]}")
    if needed_by:
        log.warning(f"{folder}: replaced; {needed_by} no longer fit")


def _fingerprint_in(folder: Path, force: bool) -> str | None:
    """Of the tokenizer in `folder`, a tokenizer.json or GPT-2's files; None where there is none.

    A damaged one is an error, or with `force` none.
    """
    from llm.tokenizer import TokenizerError, load_tokenizer

    try:
        return load_tokenizer(folder).fingerprint
    except TokenizerError as error:
        if not (folder / "tokenizer.json").exists():
            return None
        if force:
            log.warning(f"{error} It is replaced.")
            return None
        raise UserError(f"{error} Choose another --out, or give --force to replace it.") from None


def _users(folder: Path, fingerprint: str) -> str | None:
    """What needs the tokenizer in `folder`, in words; None where nothing was made with it."""
    from llm.corpus.tokenizer_use import datasets_made_with

    datasets = datasets_made_with(folder, fingerprint)
    if datasets is None:
        return "datasets that may have been made with it (no used_by.json tells) and models trained on them"
    if not datasets:
        return None
    return f"datasets made with it ({', '.join(map(str, datasets))}) and the models trained on them"


if __name__ == "__main__":
    cli.run(main)
