"""Text to token ids and back: one protocol, three kinds."""

from pathlib import Path

from llm.tokenizer.protocol import IM_END, IM_START, SPECIAL_TOKENS, Tokenizer, TokenizerError, tokenizer_info

__all__ = ["IM_END", "IM_START", "SPECIAL_TOKENS", "Tokenizer", "TokenizerError", "load_tokenizer", "tokenizer_info"]


def load_tokenizer(path: str | Path, kind: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, a file or the folder that holds it. `kind` None: recognised from what is there.

    kind "huggingface" is any tokenizer.json, "bpe" one that tools/train_tokenizer.py made, "tiktoken" GPT-2's files.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"{path}: there is no tokenizer. Train one with tools/train_tokenizer.py, or give another path.")
    file = path / "tokenizer.json" if path.is_dir() else path
    wants_json = kind != "tiktoken" and file.is_file() and file.suffix == ".json" and file.name != "encoder.json"
    return _load_json(file, kind) if wants_json else _load_gpt2(path, kind)


def _load_json(file: Path, kind: str | None) -> Tokenizer:
    from llm.tokenizer.huggingface import COMPANIONS, HuggingFaceTokenizer, is_trained_here

    content = file.read_bytes()
    try:
        trained_here = is_trained_here(content)
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{file}: is not a tokenizer.json: {error}.") from error
    if kind == "bpe" and not trained_here:
        raise TokenizerError(f"{file}: kind 'bpe' is for tokenizers of tools/train_tokenizer.py, this is another. Use kind 'huggingface'.")
    companions = {name: (file.parent / name).read_bytes() for name in COMPANIONS if (file.parent / name).is_file()}
    return HuggingFaceTokenizer(content, kind or ("bpe" if trained_here else "huggingface"), str(file), companions)


def _load_gpt2(path: Path, kind: str | None) -> Tokenizer:
    from llm.tokenizer.gpt2 import HOW_TO_PROVIDE, MERGES, RANKS, VOCABULARY, TiktokenTokenizer

    folder = path if path.is_dir() else path.parent
    sets = [(MERGES, VOCABULARY), *((name,) for name in RANKS)]
    found = [names for names in sets if all((folder / name).is_file() for name in names) and (path.is_dir() or path.name in names)]
    if kind in ("huggingface", "bpe"):
        raise TokenizerError(f"{path}: holds no tokenizer.json, which kind {kind!r} needs.")
    if not found:
        wanted = "GPT-2's files, which kind 'tiktoken' needs" if kind else "neither a tokenizer.json nor GPT-2's files"
        raise TokenizerError(f"{path}: holds {'none of ' if kind else ''}{wanted}. {HOW_TO_PROVIDE}")
    return TiktokenTokenizer({name: (folder / name).read_bytes() for name in found[0]}, str(path))
