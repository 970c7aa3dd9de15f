"""A model, a tokenizer and questions small enough for tests."""

import csv
from functools import cache
from pathlib import Path

import torch

from llm.config import ModelConfig
from llm.model.init import build_model
from llm.model.transformer import Transformer
from llm.tokenizer.train import train_bpe

QUESTIONS = [
    ("How many legs has a spider?", "six", "eight", "ten", "none", "B"),
    ("Which, of these, is a ""noble"" gas?\nChoose one.", "oxygen", "helium, He", "iron", "0.50", "C"),
    (" What is 1+1? ", "1", "2", "3", "4", "A"),
    ("Which sea is salty", "the Dead Sea", "none", "both", "a very long choice that makes the row longer than all the others here", "D"),
]  # fmt: skip


@cache
def tokenizer():
    """ " A" is one token, " B" two: so it shows who divides by lengths."""
    return train_bpe(["Answer: A\n" * 50, "The following are multiple choice questions", "\nAnswer:"], vocab_size=300).tokenizer


@cache
def model(seq_len: int = 512, **changes) -> Transformer:
    """Sure of itself: its likelihoods lie far apart."""
    fields = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=seq_len, init_std=0.3) | changes
    made = build_model(ModelConfig(**fields).with_vocab(tokenizer().vocab_size), seed=2).eval()
    made.head.weight.data *= 8  # else one token beats two whatever they are
    return made


def plain_score(model: Transformer, context, continuation) -> tuple[float, bool]:
    """By definition: one row, all logits."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_probs = model(ids[:, :-1]).float().log_softmax(-1)[0, -len(continuation) :]
    found = [log_probs[i, target].item() for i, target in enumerate(continuation)]
    return sum(found), log_probs.argmax(-1).tolist() == list(continuation)


def write_mmlu(folder: Path, subjects: list[str], shots: int = 2) -> Path:
    for at, name in enumerate(subjects):
        for split, rows in (("dev", (QUESTIONS * 2)[:shots]), ("test", QUESTIONS[at % 2 :] + QUESTIONS)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            with open(folder / split / f"{name}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    return folder
