"""What is said of a tokenizer after its training."""

from raw_text import prose

from llm.corpus.conversations import CHATML
from llm.corpus.documents import Document
from llm.corpus.token_report import report_tokens
from llm.tokenizer.train import train_bpe

TEXTS = [prose(i, 50) for i in range(400)]


def test_bytes_per_token_of_each_source_beside_another_tokenizer_and_what_a_chat_turn_saves(capsys):
    ours, other = (train_bpe(TEXTS, size).tokenizer for size in (700, 260))
    report_tokens([Document(text, "ab"[i % 2], 0) for i, text in enumerate(TEXTS)], CHATML, ours, other)
    said = capsys.readouterr().out
    for line in ("  a: ", "  b: ", "all 2 sources: "):
        ours_said, other_said = said.split(line)[1].split("\n")[0].split(" bytes per token, the other tokenizer ")
        assert float(ours_said) > 1.5 * float(other_said.split()[0])
    spelled = len(ours.encode("<|im_start|>")) + len(ours.encode("<|im_end|>"))
    assert f"{spelled - 2} tokens saved each turn" in said
