"""From a draw back to the files and documents that its tokens came from."""

import numpy as np

from llm.data.ledger import Phase
from llm.data.origin import origins
from llm.data.sampler import Sampler
from llm.data.shards import Shard, token_dtype, write_shard

TOKENIZER = {"fingerprint": "f", "kind": "test", "vocab_size": 100, "eos_id": 99, "pad_id": 99}
DOCUMENTS = [("a.txt", 0, 5), ("a.txt", 1, 10), ("c.txt", 0, 9), ("d.txt", 0, 3)]  # file, document in it, tokens; b.txt has none here


def make_shard(folder, first: int) -> Shard:
    """Token i of the shard has id first + i."""
    lengths = np.array([n for *_, n in DOCUMENTS])
    units = [
        {"unit_id": f"{first}-{name}", "name": name, "bytes": 1, "docs": sum(file == name for file, *_ in DOCUMENTS)}
        for name in ("a.txt", "b.txt", "c.txt", "d.txt")
    ]
    parts = [(np.arange(first, first + lengths.sum()), lengths)]
    meta = write_shard(
        folder, f"s{first}", parts, dtype=token_dtype(100), tokenizer=TOKENIZER, units=units, role="train", seq_len=8, writer={"version": "t"}
    )
    return Shard.open(meta.path)


def test_every_draw_names_the_tokens_it_fed_and_their_documents(tmp_path):
    shards = {shard.meta.shard_id: shard for shard in (make_shard(tmp_path, 0), make_shard(tmp_path, 50))}
    phase = Phase.plan("p0", 1, 2, 8, list(shards.values()))
    ids, counted = Sampler(phase, list(shards.values())).rows(np.arange(phase.total))
    document_of = [(file, n) for file, n, length in DOCUMENTS for _ in range(length)]
    found = origins(phase, 0, phase.total, shards)
    assert len(found) == 16
    for row, is_counted, origin in zip(ids, counted, found, strict=True):
        first = int(origin.shard.name[1:])
        fed = row[: 1 + int(is_counted.sum())] - first
        assert fed.tolist() == list(range(*origin.pieces[0])) and len(origin.pieces) == 1
        assert origin.documents == sorted({document_of[i] for i in fed})
    assert all(not origin.documents for origin in origins(phase, 3, 5, {}))
