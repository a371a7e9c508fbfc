"""Text from a journal, made harmless for a terminal: no control characters, nothing that the encoding cannot say."""

from __future__ import annotations

import unicodedata

_PLAIN = str.maketrans(
    {"→": "->", "●": "*", "·": "-", "…": "...", "×": "x", "–": "-", "≥": ">=", "≤": "<=", "█": "#", "▏": "|", "✗": "x"}
)
_HARMFUL = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def clean(text: str, *, encoding: str = "utf-8", most: int = 2000) -> str:
    """Return `text` on one line, without control, format (bidi, zero-width) or surrogate characters.

    Args:
        text: anything, a stranger's parameter name included.
        encoding: what the reader's terminal or file can hold; the rest is spelled out.
        most: longer texts are cut.

    Returns:
        Text that can be printed as it is.
    """
    if len(text) > most:
        text = text[: most - 1] + "…"
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if c in "\n\r\t" else f"\\x{ord(c):02x}" if unicodedata.category(c) in _HARMFUL else c for c in text
        )
    if encoding.replace("-", "").lower() not in ("utf8", "utf16", "utf32"):
        try:
            text.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            text = text.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii")
    return text
