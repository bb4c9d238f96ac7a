"""Real English prose that every Python installation carries: the language reference behind `help()`."""

import re
from functools import cache
from pydoc_data.topics import topics

__all__ = ["prose_paragraphs"]

_MIN_CHARS = 120
_MARKUP = re.compile(r"[*=~^#_]{3,}|::=|>>>|^[^A-Za-z“\"]")


def _is_prose(paragraph: str) -> bool:
    """Keep running text; leave out code, grammar, tables and headings."""
    body = " ".join(paragraph.split())
    indented = paragraph.lstrip("\n").startswith("      ")
    return len(body) >= _MIN_CHARS and body.endswith((".", ":")) and not indented and not _MARKUP.search(body)


@cache
def prose_paragraphs() -> tuple[str, ...]:
    """Return the paragraphs of running text in the Python language reference, each once and on one line.

    The topics come in alphabetical order. The words differ a little between Python versions; each version has
    about 180,000 characters or more, 40,000 tokens of an English tokenizer.
    """
    found = (p for name in sorted(topics) for p in topics[name].split("\n\n") if _is_prose(p))
    return tuple(dict.fromkeys(" ".join(p.split()) for p in found))
