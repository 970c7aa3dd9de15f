"""Real shards whose data tell where they came from: token i of all the shards together has value i."""

from pathlib import Path

import numpy as np

from llm.data.shards import Shard, token_dtype, write_shard

VOCAB_SIZE = 70_000
PAD_ID = VOCAB_SIZE - 1
TOKENIZER = {"fingerprint": "ab" * 32, "kind": "bpe", "vocab_size": VOCAB_SIZE, "eos_id": 0, "pad_id": PAD_ID}


def write_counting(folder: Path, name: str, n_tokens: int, first: int = 0, doc_tokens: int = 7, **changes):
    """Publish one shard with the values first, first + 1, ... in documents of doc_tokens; `changes` go to write_shard."""
    ids = np.arange(first, first + n_tokens)
    ends = [*range(doc_tokens, n_tokens, doc_tokens), n_tokens]
    options = {
        "tokenizer": TOKENIZER, "units": [{"unit_id": f"unit-{first}-{n_tokens}", "bytes": 3 * n_tokens}],
        "role": "train", "seq_len": 8, "writer": {"backend": "test"}, **changes,
    }
    options.setdefault("dtype", token_dtype(options["tokenizer"]["vocab_size"]))
    return write_shard(folder, name, [(ids, np.diff(ends, prepend=0))], **options)


def counting_shards(folder: Path, sizes: list[int], **changes) -> list[Shard]:
    """One shard of each size; values go on from shard to shard."""
    firsts = np.cumsum([0, *sizes])
    metas = [write_counting(folder, f"text-{i:05}", size, int(firsts[i]), **changes) for i, size in enumerate(sizes)]
    return [Shard.open(meta.path) for meta in metas]
