"""A tokenizer as the files that Hugging Face's AutoTokenizer loads."""

import json
from pathlib import Path

import tokenizers

from llm.tokenizer.gpt2 import PATTERN, TiktokenTokenizer
from llm.tokenizer.huggingface import FILE
from llm.tokenizer.protocol import SPECIAL_TOKENS, Tokenizer
from llm.tokenizer.ranks import tokenizer_of


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
    bpe = tokenizer_of(tokenizer.ranks, PATTERN)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # brings the same pattern by itself
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return bpe.to_str(pretty=True)
