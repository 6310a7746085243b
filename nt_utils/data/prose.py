"""Running text that every Python carries: paragraphs of its language reference (`pydoc_data.topics`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pydoc_data.topics import topics

WORDS = 40
"""Least number of words of a passage of the source `python-prose`."""


def passages(words: int = WORDS) -> Iterator[tuple[str, str]]:
    """Topics and passages of at least `words` words. Their wording differs a little between versions of Python."""
    seen = set()
    for name, text in sorted(topics.items()):
        passage: list[str] = []
        for block in re.split(r"\n\s*\n", text):
            lines = block.strip("\n").splitlines()
            plain = " ".join(lines).replace("- ", "-")
            # Paragraphs alone: no grammar, code, heading, list or note.
            if any(line[:1].isspace() for line in lines) or not re.match(r"[A-Z][^:=>|]{60,}\.$", plain):
                continue
            if plain in seen:  # some sections stand under several topics
                continue
            seen.add(plain)
            passage += plain.split()
            if len(passage) >= words:
                yield name, " ".join(passage)
                passage = []
