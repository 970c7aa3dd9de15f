"""Long texts in parts that encode to the same ids as the whole."""

import re

CUT_CHARS = 1 << 20  # an encoder needs about 100 bytes a token beside the text, so a book is better encoded in parts

# Every pattern here (GPT-2's, GPT-4's and their kin) ends a match between an ASCII letter and white space: no branch takes
# white space after a letter, none looks behind, and those that look ahead stand on white space themselves.
_BORDER = re.compile(r"(?<=[A-Za-z])(?=\s)")


def cut_text(text: str, chars: int) -> list[str]:
    """`text` in parts of `chars` characters or somewhat more, cut only where the tokenizer's pattern splits anyway."""
    parts, start = [], 0
    while len(text) - start > chars and (border := _BORDER.search(text, start + chars)):
        parts.append(text[start : border.start()])
        start = border.start()
    return [*parts, text[start:]]
