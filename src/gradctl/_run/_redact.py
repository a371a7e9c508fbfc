"""Secrets in a command line, left out of what is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "[redacted]"
_NAME = re.compile(
    r"(?:^|.*[-_.])(?:(?:api|access|secret|private|auth|account)?[-_]?key|secrets?|password|passwd|passphrase|pwd|pw"
    r"|credentials?|auth|authorization|bearer|cookie|(?:auth|access|api|hf)?token)",
    re.IGNORECASE,
)
# Tokens of a vocabulary and keys of a table: `--pad-token`, `--sort_key`.
_NO_SECRET = re.compile(
    r"(?:.*[-_.])?(?:pad|eos|bos|unk|mask|sep|cls|image|video|audio|special|stop|start|end|decoder|prompt|first|last|per"
    r"|num|max|min|sort|primary|foreign|group|monitor|metric|frame|state|dict|label|text|input|output|data|target|column"
    r"|cache|hash|join|loss|feature|best|query|model)[-_.](?:token|key)",
    re.IGNORECASE,
)
# What vendors' tokens look like, wherever they stand.
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{8,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?|[0-9a-f]{40})\b"
)
_IN_URL = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)(?=@)")
_ASSIGNED = re.compile(r"(?P<head>^-{0,2}(?P<name>[A-Za-z_][\w.-]*)[=:])(?P<value>.+)$", re.DOTALL)
_IN_TEXT = re.compile(
    r"(?P<head>\b[\w.-]*(?:api_?key|secret|password|passwd|token)\b[\"']?\s*[=:]\s*)(?P<quote>[\"'])(?P<value>.*?)(?P=quote)",
    re.IGNORECASE,
)


def redact(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with what looks like a secret replaced by `[redacted]`.

    Hidden are the value of an option or an assignment whose name ends in key, token, password and the like
    (`--api-key X`, `--hf_token=X`, `token=X`), passwords in URLs, and words in the form of well-known tokens.
    """
    kept: list[str] = []
    hide_next = False
    for argument in arguments:
        if hide_next and not (argument.startswith("--") and len(argument) > 2):
            kept.append(HIDDEN)
            hide_next = False
            continue
        assigned = _ASSIGNED.match(argument)
        if assigned and _names_secret(assigned["name"]):
            kept.append(assigned["head"] + HIDDEN)
            hide_next = False
            continue
        hide_next = argument.startswith("-") and "=" not in argument and _names_secret(argument.lstrip("-"))
        text = _IN_URL.sub(lambda match: f"{match[1]}:{HIDDEN}", argument)
        text = _IN_TEXT.sub(lambda match: f"{match['head']}{match['quote']}{HIDDEN}{match['quote']}", text)
        kept.append(_VALUE.sub(HIDDEN, text))
    return kept


def _names_secret(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and _NO_SECRET.fullmatch(name) is None
