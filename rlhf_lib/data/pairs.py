"""Preference data as the stages read it: cleaned, split by conversation, tokenised, audited.

`sources` reads rows with their places, `dialogues` turns a row into prompt and replies or says why
not, `encoding` makes token ids, `audit` measures what was found. Here they come together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.audit import SMALLER, Dropped, describe, digest, repeated
from rlhf_lib.data.batches import chunks
from rlhf_lib.data.dialogues import (
    TextPair,
    Unusable,
    conversation_key,
    pair_up,
    read_demonstration,
    read_pair,
    read_prompt,
)
from rlhf_lib.data.encoding import CHUNK, Demonstration, Encoder, Pair, Prompt, encoder_of
from rlhf_lib.data.sources import DataError, Row, Source, read_source
from rlhf_lib.data.store import Stored, Writer
from rlhf_lib.data.truth import Truth, truth_of
from rlhf_lib.settings import DataConfig, SettingsError

T = TypeVar("T")


@dataclass(frozen=True)
class PreferenceData:
    """All that the stages read, and what is known about it.

    `pairs`: "train", "validation", "test". `prompts`: "train" (for RL), "validation", "evaluation".
    `demonstrations` come from the train split. `hash` covers texts and token ids of all of them.
    Rows are read from disk when they are asked for, so memory does not grow with their number.
    """

    pairs: Mapping[str, Sequence[Pair]]
    demonstrations: Sequence[Demonstration]
    prompts: Mapping[str, Sequence[Prompt]]
    audit: dict
    hash: str
    truth: Truth | None = None


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Read, clean, split and tokenise the pairs of `config.source`.

    Raises SettingsError for settings that cannot hold, DataError for data that cannot be used.
    """
    sizes = split_sizes(config)
    encoder = encoder_of(tokenizer, config)
    dropped, notes = Dropped(), []

    # 1. read
    source = read_source(config.source)
    if source.prompts and config.judge_pairs:
        raise SettingsError(
            f"data.judge_pairs={config.judge_pairs}: the bundled world keeps no pairs for a judge, "
            "its gold reward is known; leave it at 0"
        )

    # 2. clean
    def read(row: Row) -> TextPair:
        pair = read_pair(row)
        encoder.check(pair.prompt)
        return pair

    paired = {split: pair_up(rows, dropped.add) for split, rows in source.splits.items()}
    texts = {split: _clean(rows, read, dropped) for split, rows in paired.items()}
    shared = shared_conversations(texts)

    # 3. split and encode
    pairs: dict[str, Stored[Pair]] = {}
    if source.prompts:  # the bundled world was split when it was made
        for split, size in sizes.items():
            pairs |= fill(texts[split], {split: size}, encoder, dropped)
    else:
        pairs = split_pairs(texts, shared, sizes, config.split_seed, encoder, dropped, notes)
    rows_read = sum(len(rows) for rows in source.splits.values())
    if empty := [split for split, rows in pairs.items() if not rows]:
        raise DataError(
            f"{config.source}: no pair for {', '.join(empty)}. {rows_read} rows were read; left "
            f"out: {dropped}. {_way_out(texts, dropped)}"
        )
    if source.prompts:
        demonstrations, prompts = _own_rows(source, config, encoder, dropped)
    else:
        demonstrations, prompts = _rows_of_pairs(pairs, config)
        notes += _alike(pairs["train"])
    if config.demonstrations_from:
        own = read_source(config.demonstrations_from)
        source.files.extend(own.files)
        demonstrations = _given(own, pairs, config, encoder, dropped)

    # 4. audit
    for split, rows in texts.items():
        notes += (f"{split}: {note}" for note in repeated(rows))
    splits = {
        split: describe(rows, encoder.cut_prompts, encoder.eos, encoder.unknown)
        for split, rows in pairs.items()
    }
    if (unknown := splits["train"]["unknown_token_share"]) > 0.05:
        notes.append(
            f"{unknown:.0%} of the tokens are unknown to this model: its vocabulary is not made "
            "for this text (the tiny model knows the bundled world only)"
        )
    wanted = {f"{split}_pairs": size for split, size in sizes.items()}
    for key in ("demonstrations", "rl_prompts", "evaluation_prompts"):
        wanted[key] = getattr(config, key)
    audit = {
        "source": config.source,
        "template": encoder.written,
        "files": source.files,
        "rows_read": rows_read,
        # before splitting: the wanted sizes may leave some unused
        "rows_usable": sum(len(rows) for rows in texts.values()),
        "dropped": dropped.as_dict(),
        "shared_conversations": len(shared),  # by the source's own splits
        "wanted": wanted,
        "splits": splits,
        "demonstrations": len(demonstrations),
        "prompts": {
            kind: {"count": len(rows), "distinct": len(_first_of_each(p.text for p in rows))}
            for kind, rows in prompts.items()
        },
        "notes": notes,
    }
    content = _hash(pairs, demonstrations, prompts)
    truth = truth_of(config.source)
    return PreferenceData(pairs, demonstrations, prompts, audit, content, truth)


Rows = tuple[Sequence[Demonstration], Mapping[str, Sequence[Prompt]]]


def _way_out(texts: Mapping[str, Sequence[TextPair]], dropped: Dropped) -> str:
    """What helps where a split stayed empty."""
    usable = [row.conversation for rows in texts.values() for row in rows]
    if len(usable) > 2 and len(set(usable)) == 1:
        return (
            f"All {len(usable)} usable pairs begin with the same first turn, and a conversation "
            "stays in one split: give pairs that begin differently"
        )
    return SMALLER if len(usable) > dropped.most else dropped.advice()


def _given(
    source: Source,
    pairs: Mapping[str, Sequence[Pair]],
    config: DataConfig,
    encoder: Encoder,
    dropped: Dropped,
) -> Stored[Demonstration]:
    """Demonstrations of a source of their own, of no conversation that something is measured on."""
    held_out = {p.conversation for s, rows in pairs.items() if s != "train" for p in rows}

    def read(row: Row) -> tuple[str, str]:
        prompt, reply = read_demonstration(row)
        encoder.check(prompt)
        if conversation_key(prompt) in held_out:
            raise Unusable("demonstration's conversation is held out")
        return prompt, reply

    texts = _clean(chain.from_iterable(source.splits.values()), read, dropped)
    if not texts:
        raise DataError(
            f"{config.demonstrations_from}: no demonstration; left out: {dropped}. One has "
            "`prompt` and `completion`, or `messages`"
        )
    return Stored.of(encoder.demonstrations(texts[: config.demonstrations]))


def _own_rows(source: Source, config: DataConfig, encoder: Encoder, dropped: Dropped) -> Rows:
    """The bundled world's demonstrations and prompts: a sample of how often each is asked."""
    texts = _clean(source.demonstrations, read_demonstration, dropped)
    prompts = {}
    for kind, rows in source.prompts.items():
        limit = config.rl_prompts if kind == "train" else config.evaluation_prompts
        prompts[kind] = encoder.prompts(_clean(rows, read_prompt, dropped)[:limit])
    return encoder.demonstrations(texts[: config.demonstrations]), prompts


def _rows_of_pairs(pairs: dict[str, Stored[Pair]], config: DataConfig) -> Rows:
    """Demonstrations and prompts without repeats, each from the split it may be used with."""
    train, limit = pairs["train"], config.evaluation_prompts
    # one reply is often preferred to several others
    first = _first_of_each((p.prompt_text, p.chosen_text) for p in train)[: config.demonstrations]
    demonstrations = Stored.of(
        Demonstration(p.prompt_text, p.chosen_text, p.prompt, p.chosen) for p in train.select(first)
    )
    prompts = {}
    for kind, split, size in (
        ("train", "train", config.rl_prompts),
        ("validation", "validation", limit),
        ("evaluation", "test", limit),
    ):
        first = _first_of_each(p.prompt for p in pairs[split])[:size]  # equal once cut: equal
        rows = pairs[split].select(first)
        prompts[kind] = Stored.of(Prompt(p.prompt_text, p.prompt) for p in rows)
    return demonstrations, prompts


def _alike(train: Sequence[Pair]) -> list[str]:
    """Whether prompts that differ are one once they are token ids."""
    texts = len(_first_of_each(p.prompt_text for p in train))
    ids = len(_first_of_each(p.prompt for p in train))
    if ids == texts:
        return []
    return [
        f"{texts} different training prompts are {ids} to this model: its tokenizer does not tell "
        "them apart, or they are cut; each is asked once"
    ]


def _first_of_each(values: Iterable[object]) -> np.ndarray:
    """Where each distinct value stands first, in order. Keeps 16 bytes of a value."""
    return np.sort(np.unique(np.fromiter(map(digest, values), "S16"), return_index=True)[1])


def _clean(rows: Iterable[Row], read: Callable[[Row], T], dropped: Dropped) -> Stored[T]:
    """What `read` makes of each row; rows that it refuses are counted in `dropped`."""
    found: Writer[T] = Writer()
    for row in rows:
        try:
            found.append(read(row))
        except Unusable as reason:
            dropped.add(str(reason), row.place, row.values)
    return found.stored()


def _hash(pairs: Mapping, demonstrations: Sequence, prompts: Mapping) -> str:
    """SHA-256 (hex) of every row, in order, under the name of what it is for."""
    digest = hashlib.sha256()
    for name, rows in [*sorted(pairs.items()), ("", demonstrations), *sorted(prompts.items())]:
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(repr(row).encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------- splits


def split_sizes(config: DataConfig) -> dict[str, int]:
    """Pairs of each split, in the order in which splits are filled. Raises SettingsError."""
    sizes = {split: getattr(config, f"{split}_pairs") for split in ("test", "validation", "train")}
    if config.judge_pairs:
        sizes["judge"] = config.judge_pairs
    if small := next((split for split, size in sizes.items() if size < 1), None):
        raise SettingsError(f"data.{small}_pairs={sizes[small]}: each split needs a pair at least")
    return sizes


def shared_conversations(texts: dict[str, Stored[TextPair]]) -> set[str]:
    """Conversations of the source's own test or validation split that its train split has too."""
    held_out = {
        row.conversation for split, rows in texts.items() if split != "train" for row in rows
    }
    return {row.conversation for row in texts["train"] if row.conversation in held_out}


def split_pairs(
    texts: dict[str, Stored[TextPair]],
    shared: set[str],
    sizes: dict[str, int],
    seed: int,
    encoder: Encoder,
    dropped: Dropped,
    notes: list[str],
) -> dict[str, Stored[Pair]]:
    """Test and validation first, train from the rest; a split that the source has is respected.

    No conversation stands in two splits.
    """
    pairs: dict[str, Stored[Pair]] = {}
    sizes = dict(sizes)
    for own in ("test", "validation"):
        if own in texts:
            taken = {p.conversation for split in pairs.values() for p in split}
            rows, _ = _part(_shuffled(texts[own], seed), taken)
            pairs |= fill(rows, {own: sizes.pop(own)}, encoder, dropped)
    rows, held_out = _part(_shuffled(texts["train"], seed), shared)
    for row in held_out:
        dropped.add("conversation is held out", row.place)
    if len(rows) < sum(sizes.values()):
        share = len(rows) / sum(sizes.values())
        notes.append(
            f"{len(rows)} usable pairs where {' + '.join(map(str, sizes.values()))} were wanted "
            f"({', '.join(sizes)}): each split got {share:.0%} of its size"
        )
        smaller = {s: max(1, int(size * share)) for s, size in sizes.items() if s != "train"}
        sizes = smaller | {"train": sizes["train"]}
    return pairs | fill(rows, sizes, encoder, dropped)


def _shuffled(rows: Stored[TextPair], seed: int) -> Stored[TextPair]:
    """In an order that depends on the conversation and the seed alone, not on the other rows.

    Rows of one conversation stand side by side.
    """
    keys = (hashlib.sha256(f"{seed} {row.conversation}".encode()).digest() for row in rows)
    return rows.select(np.argsort(np.fromiter(keys, "S32"), kind="stable"))


def _part(
    rows: Stored[TextPair], conversations: set[str]
) -> tuple[Stored[TextPair], Stored[TextPair]]:
    """The rows outside `conversations`, and those inside."""
    inside = np.fromiter((row.conversation in conversations for row in rows), bool)
    return rows.select(np.flatnonzero(~inside)), rows.select(np.flatnonzero(inside))


def fill(
    rows: Sequence[TextPair], sizes: dict[str, int], encoder: Encoder, dropped: Dropped
) -> dict[str, Stored[Pair]]:
    """Splits of at most `sizes` pairs, filled in turn; a conversation stays in its first split.

    For more than one split, rows of a conversation stand side by side.
    """
    pairs: dict[str, Writer[Pair]] = {split: Writer() for split in sizes}
    encoded = (
        both
        for batch in chunks(rows, CHUNK)
        for both in zip(batch, encoder.pairs(batch), strict=True)
    )
    split, conversation = "", None
    for text, pair in encoded:
        unfilled = next((s for s, size in sizes.items() if len(pairs[s]) < size), None)
        if unfilled is None:
            break
        if pair.chosen == pair.rejected:
            cut = pair.chosen[-1] != encoder.eos
            reason = "identical after truncation" if cut else "identical to this model's tokenizer"
            dropped.add(reason, text.place)
            continue
        if pair.conversation != conversation:
            split, conversation = unfilled, pair.conversation
        if len(pairs[split]) < sizes[split]:
            pairs[split].append(pair)
    return {split: writer.stored() for split, writer in pairs.items()}


def draw_pairs(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """`size` pairs drawn without replacement; a smaller subset lies within a larger one."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:size]]
