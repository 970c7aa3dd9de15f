"""GPT-2's alphabet: each of the 256 bytes has a printable character, so that vocabularies can be written as text."""


def _alphabet() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _alphabet()
"""Character to byte, in the order of GPT-2's first 256 ids."""
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes:
    """The bytes that `token` stands for; KeyError if it holds a character outside the alphabet."""
    return bytes(BYTE_OF[char] for char in token)
