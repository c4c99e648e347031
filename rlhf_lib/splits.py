"""Which pairs go to which split: held out by conversation, in an order that only a seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_lib.audit import Dropped
from rlhf_lib.batches import chunks
from rlhf_lib.config import DataConfig, SettingsError
from rlhf_lib.dialogues import Texts
from rlhf_lib.encoding import CHUNK, Encoder, Pair
from rlhf_lib.store import Stored, Writer


def split_sizes(config: DataConfig) -> dict[str, int]:
    """Pairs of each split, in the order in which splits are filled. Raises SettingsError."""
    sizes = {"test": config.test_pairs, "validation": config.validation_pairs,
             "train": config.train_pairs}  # fmt: skip
    if config.judge_pairs:
        sizes["judge"] = config.judge_pairs
    if small := next((split for split, size in sizes.items() if size < 1), None):
        raise SettingsError(f"data.{small}_pairs={sizes[small]}: each split needs a pair at least")
    return sizes


def shared_conversations(texts: dict[str, Stored[Texts]]) -> set[str]:
    """Conversations of the source's own test or validation split that its train split has too."""
    held_out = {
        key
        for split, rows in texts.items()
        if split != "train"
        for key in rows.column("conversation")
    }
    return {key for key in texts["train"].column("conversation") if key in held_out}


def split_pairs(
    texts: dict[str, Stored[Texts]], shared: set[str], sizes: dict[str, int], seed: int,
    encoder: Encoder, dropped: Dropped, notes: list[str],
) -> dict[str, Sequence[Pair]]:  # fmt: skip
    """Test and validation first, train from the rest; a split that the source has is respected.

    No conversation stands in two splits.
    """
    pairs: dict[str, Sequence[Pair]] = {}
    sizes = dict(sizes)
    for own in ("test", "validation"):
        if own in texts:
            taken = {p.conversation for split in pairs.values() for p in split}
            rows, _ = _part(_shuffled(texts[own], seed), taken)
            pairs |= fill(rows, {own: sizes.pop(own)}, encoder, dropped)
    rows, held_out = _part(_shuffled(texts["train"], seed), shared)
    for place in held_out.column("place"):
        dropped.add("conversation is held out", place)
    if len(rows) < sum(sizes.values()):
        share = len(rows) / sum(sizes.values())
        notes.append(
            f"{len(rows)} usable pairs where {' + '.join(map(str, sizes.values()))} were wanted "
            f"({', '.join(sizes)}): each split got {share:.0%} of its size"
        )
        smaller = {s: max(1, int(size * share)) for s, size in sizes.items() if s != "train"}
        sizes = smaller | {"train": sizes["train"]}
    return pairs | fill(rows, sizes, encoder, dropped)


def _shuffled(rows: Stored[Texts], seed: int) -> Stored[Texts]:
    """In an order that depends on the conversation and the seed alone, not on the other rows.

    Rows of one conversation stand side by side.
    """
    keys = (hashlib.sha256(f"{seed} {c}".encode()).digest() for c in rows.column("conversation"))
    return rows.select(np.argsort(np.fromiter(keys, "S32"), kind="stable"))


def _part(rows: Stored[Texts], conversations: set[str]) -> tuple[Stored[Texts], Stored[Texts]]:
    """The rows outside `conversations`, and those inside."""
    inside = np.fromiter((key in conversations for key in rows.column("conversation")), bool)
    return rows.select(np.flatnonzero(~inside)), rows.select(np.flatnonzero(inside))


def fill(
    rows: Sequence[Texts], sizes: dict[str, int], encoder: Encoder, dropped: Dropped
) -> dict[str, Sequence[Pair]]:
    """Splits of at most `sizes` pairs, filled in turn; a conversation stays in its first split.

    For more than one split, rows of a conversation stand side by side.
    """
    pairs = {split: Writer(Pair) for split in sizes}
    _write_pairs(rows, pairs, sizes, encoder, dropped)
    return {split: writer.stored() for split, writer in pairs.items()}


def _write_pairs(
    rows: Sequence[Texts], pairs: dict[str, Writer[Pair]], sizes: dict[str, int], encoder: Encoder,
    dropped: Dropped,
) -> None:  # fmt: skip
    split, conversation = "", None
    for batch in chunks(rows, CHUNK):
        for text, pair in zip(batch, encoder.pairs(batch), strict=True):
            unfilled = next((s for s, size in sizes.items() if len(pairs[s]) < size), None)
            if unfilled is None:
                return
            if pair.chosen == pair.rejected:
                dropped.add("identical after truncation", text.place)
                continue
            if text.conversation != conversation:
                split, conversation = unfilled, text.conversation
            if len(pairs[split]) < sizes[split]:
                pairs[split].append(pair)
