"""How varied a policy's replies are: distinct n-grams, and what a reply repeats of itself."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = 16  # replies in which distinct n-grams are counted together


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of `n` words, in lower case, words parted by white space."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int, block: int = BLOCK) -> list[float]:
    """Distinct n-grams over all n-grams (Li et al. 2016, arXiv:1510.03055), one value a block.

    The ratio falls with the amount of text, so it is taken over `block` replies at a time; what is
    left over is not counted unless it is all there is. A block without any n-gram has 0.
    """
    whole = max(1, len(texts) // block)
    values = []
    for start in range(0, whole * block, block):
        grams = [gram for text in texts[start : start + block] for gram in ngrams(text, n)]
        values.append(len(set(grams)) / max(1, len(grams)))
    return values


def repetition(text: str, n: int = 4) -> float:
    """Share of a reply's n-grams that it has said before (seq-rep-n of arXiv:1908.04319)."""
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
