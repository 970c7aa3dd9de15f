"""A tokenizer as the files that Hugging Face's AutoTokenizer loads."""

import json
from pathlib import Path

import tokenizers

from llm.tokenizer.byte_level import BYTE_OF
from llm.tokenizer.gpt2 import TiktokenTokenizer
from llm.tokenizer.huggingface import FILE
from llm.tokenizer.protocol import SPECIAL_TOKENS, Tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, seq_len: int, chat_template: str | None = None) -> None:
    """Its tokenizer.json, and what it was imported with beside it or else a tokenizer_config.json of our own.

    `chat_template`: as Jinja, instead of what it was imported with; None: there is none but that.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        (folder / FILE).write_text(gpt2_json(tokenizer), encoding="utf-8")
    else:
        tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else _config(tokenizer, seq_len)
    if chat_template:
        config["chat_template"] = chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would go before
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(tokenizer: Tokenizer, seq_len: int) -> dict:
    names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names[tokenizer.pad_id],
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }


def gpt2_json(tokenizer: TiktokenTokenizer) -> str:
    """GPT-2's vocabulary as a tokenizer.json that gives the same ids."""
    letter = {byte: char for char, byte in BYTE_OF.items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in tokenizer.ranks}
    merges = [tuple(spelled[half] for half in _halves(token, tokenizer.ranks)) for token in tokenizer.ranks if len(token) > 1]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({spelled[token]: rank for token, rank in tokenizer.ranks.items()}, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return bpe.to_str(pretty=True)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged into this one: what byte pair encoding makes of it with the merges before its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        _, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
