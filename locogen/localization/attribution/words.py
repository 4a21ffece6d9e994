"""What stands at each token position of an encoded prompt, in words."""

from __future__ import annotations

from locogen.models.families import token_spans
from locogen.types import Pipeline

START = "(start)"
END = "(end)"
PADDING = "(pad)"


def words_of(pipe: Pipeline, prompt: str, tokens: int) -> tuple[str, ...]:
    """The word, or part of a word, at each of a prompt's positions, marks and padding in brackets.

    Args:
        pipe: A pipeline of a known family.
        prompt: Any prompt.
        tokens: How many positions the encoded prompt has.
    """
    words = [PADDING] * tokens
    offset = 0  # where the states of the next encoder begin
    for span in token_spans(pipe, prompt):
        if offset < span.start <= tokens:
            words[span.start - 1] = START
        for place, token in enumerate(span.ids, start=span.start):
            if place < tokens:
                words[place] = span.decode([token]) or PADDING
        # Where there is no end mark, the end is the last word.
        after_words = span.start + len(span.ids)
        if span.end == after_words < tokens:
            words[span.end] = END
        offset += span.limit
    return tuple(words)
