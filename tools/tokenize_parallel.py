"""Turn raw text into token shards, with several processes. The same command again continues, or adds what is new.

python tools/tokenize_parallel.py data/raw/pystdlib.jsonl --tokenizer data/tokenizers/pystdlib --seq-len 256 --val-ratio 0.01

On many machines that see the same folders, rank 0 hands out work and the others encode: mpirun -n N python tools/tokenize_parallel.py ...
"""

import os
from pathlib import Path

from llm import cli
from llm.log import log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files of text, or folders that hold them")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a tokenizer file, or the folder that holds it")
    parser.add_argument("--tokenizer-type", choices=["huggingface", "bpe", "tiktoken"], help="default: recognised from what is there")
    parser.add_argument("--seq-len", required=True, type=int, metavar="N", help="tokens per training sample")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the dataset folder; default: data/ and the first input's name")
    parser.add_argument("--workers", type=int, default=_cores(), metavar="N", help="processes (default: one per core)")
    parser.add_argument("--encoder", choices=["fast", "reference"], default="fast", help="fast (default): gigatoken where it is installed, held "
                        "against the reference while it runs; the shards are the same")  # fmt: skip
    parser.add_argument("--val-ratio", type=float, default=0.0, metavar="X", help="share of documents for validation (default: none)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 27, metavar="N", help="tokens per shard, about (default: 128 Mi)")
    parser.add_argument("--shuffle", action="store_true", help="permute documents inside each unit of text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for --shuffle (default: %(default)s)")
    parser.add_argument("--emit-jsonl", action="store_true", help="also write each shard as one JSON list of ids a line, a document each")
    parser.add_read_options()
    args = parser.parse_args()

    from llm.corpus import mpi

    if mpi.is_server():
        mpi.serve()
        return
    try:
        _tokenize(args)
    finally:
        mpi.release()


def _tokenize(args) -> None:
    from llm.corpus.options import read_options
    from llm.corpus.tokenize_corpus import Request, tokenize_corpus

    out = args.out or Path("data") / Path(os.path.abspath(args.inputs[0])).stem
    report = tokenize_corpus(
        Request(
            inputs=tuple(args.inputs),
            out=out,
            tokenizer_path=args.tokenizer,
            tokenizer_kind=args.tokenizer_type,
            seq_len=args.seq_len,
            workers=args.workers,
            encoder=args.encoder,
            val_ratio=args.val_ratio,
            shard_tokens=args.shard_tokens,
            shuffle_seed=args.seed if args.shuffle else None,
            emit_jsonl=args.emit_jsonl,
            options=read_options(args),
        )
    )
    _tell(report, out, args.val_ratio)


def _cores() -> int:
    """Those this process may use, which a scheduler may have limited; macOS cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(report, out: Path, val_ratio: float) -> None:
    counts = report.counts
    log.info(f"read {counts.records:,} documents; dropped: {counts.empty:,} empty, {counts.malformed:,} malformed; "
             f"{counts.bad_utf8:,} had bytes that are not UTF-8, replaced")  # fmt: skip
    if not report.shards:
        log.info(f"{out}: nothing new; every unit of this text is there already")
        return
    for role in ("train", "val"):
        metas = [meta for meta in report.shards if meta.role == role]
        docs, n_bytes, n_tokens = (sum(getattr(meta, key) for meta in metas) for key in ("n_docs", "n_bytes", "n_tokens"))
        if metas:
            log.info(f"{role}: {docs:,} documents, {n_bytes:,} bytes, {n_tokens:,} tokens, "
                     f"{n_bytes / n_tokens:.2f} bytes per token, shards: {len(metas)}")  # fmt: skip
        elif role == "val" and val_ratio:
            log.warning(
                f"no document fell into the validation split of {val_ratio:g}, so there will be no validation loss. Give more documents, or "
                f"make several of one file: --separator '\\n\\n' divides it at blank lines (into another --out)."
            )
    log.info(f"encoded {report.encoded_bytes:,} bytes in {report.seconds:.1f} s: {report.encoded_bytes / report.seconds / 1e6:.1f} MB/s")
    log.info(f"{out}: ready to train on (data.data_path={out})")


if __name__ == "__main__":
    cli.run(main)
