"""Make one dataset of several, for example of what machines have tokenized on disks of their own. The parts stay as they are.

python tools/merge_datasets.py /mnt/a/text /mnt/b/text --out data/text
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, log, progress


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="dataset folders that tokenize_parallel.py made")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the dataset that they are added to, new or old")
    args = parser.parse_args()

    from llm.data.manifest import load_manifest
    from llm.data.merge import merge_datasets

    total = sum(shard["n_tokens"] for folder in args.folders for shard in load_manifest(folder).shards)
    try:
        with progress(total, "merging", "tokens") as bar:
            manifest = merge_datasets(args.folders, args.out, bar.advance)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror}. Put that right and run again: what was copied is kept.") from error
    n_tokens = sum(shard["n_tokens"] for shard in manifest.shards)
    log.info(f"{args.out}: {len(manifest.sources):,} sources, {len(manifest.shards):,} shards, {n_tokens:,} tokens")


if __name__ == "__main__":
    cli.run(main)
