"""Preference data as the stages read it: cleaned, split by conversation, tokenised, audited.

`sources` reads rows with their places, `dialogues` turns a row into prompt and replies or says why
not, `encoding` makes token ids, `audit` measures what was found. Here they come together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lib.data.audit import Dropped, describe
from rlhf_lib.data.batches import chunks
from rlhf_lib.data.dialogues import Texts, Unusable, read_demonstration, read_pair, read_prompt
from rlhf_lib.data.encoding import (
    CHUNK,
    Demonstration,
    Encoder,
    Pair,
    Prompt,
    paired_lengths,
    sides,
)
from rlhf_lib.data.sources import DataError, Row, Source, read_source
from rlhf_lib.data.store import Stored, Writer
from rlhf_lib.data.truth import Truth, truth_of
from rlhf_lib.settings import DataConfig, SettingsError

__all__ = [
    "DataError",
    "Demonstration",
    "Pair",
    "PreferenceData",
    "Prompt",
    "load_data",
    "paired_lengths",
    "sides",
]

T = TypeVar("T")

COMPACT = json.JSONEncoder(default=vars, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class PreferenceData:
    """All that the stages read, and what is known about it.

    `pairs`: "train", "validation", "test". `prompts`: "train" (for RL), "validation", "evaluation".
    `demonstrations` come from the train split. `hash` covers texts and token ids of all of them.
    Rows are read from disk when they are asked for, so memory does not grow with their number.
    """

    pairs: dict[str, Sequence[Pair]]
    demonstrations: Sequence[Demonstration]
    prompts: dict[str, Sequence[Prompt]]
    audit: dict
    hash: str
    truth: Truth | None = None


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Read, clean, split and tokenise the pairs of `config.source`.

    Raises SettingsError for settings that cannot hold, DataError for data that cannot be used.
    """
    sizes = split_sizes(config)
    encoder = Encoder(tokenizer, config.max_prompt_tokens, config.max_response_tokens)
    source = read_source(config.source)
    if source.prompts and config.judge_pairs:
        raise SettingsError(
            f"data.judge_pairs={config.judge_pairs}: the bundled world keeps no pairs for a judge, "
            "its gold reward is known; leave it at 0"
        )
    dropped, notes = Dropped(), []
    texts = {
        split: Stored.of(Texts, _clean(rows, read_pair, dropped))
        for split, rows in source.splits.items()
    }
    shared = shared_conversations(texts)
    if source.prompts:  # the bundled world was split when it was made
        pairs = {
            split: fill(texts[split], {split: size}, encoder, dropped)[split]
            for split, size in sizes.items()
        }
    else:
        pairs = split_pairs(texts, shared, sizes, config.split_seed, encoder, dropped, notes)
    _check_filled(pairs, config, source, dropped)

    demonstrations = _demonstrations(
        source, pairs["train"], config.demonstrations, encoder, dropped
    )
    prompts = _prompts(source, pairs, config, encoder, dropped)
    splits = {
        split: describe(rows, encoder.cut_prompts, encoder.eos, encoder.unknown)
        for split, rows in pairs.items()
    }
    if (unknown := splits["train"]["unknown_token_share"]) > 0.05:
        notes.append(
            f"{unknown:.0%} of the tokens are unknown to this model: its vocabulary is not made "
            "for this text (the tiny model knows the bundled world only)"
        )
    usable = sum(len(rows) for rows in texts.values())
    wanted = {f"{split}_pairs": size for split, size in sizes.items()}
    for key in ("demonstrations", "rl_prompts", "evaluation_prompts"):
        wanted[key] = getattr(config, key)
    audit = {
        "source": config.source,
        "files": source.files,
        "rows_read": sum(len(rows) for rows in source.splits.values()),
        "rows_usable": usable,  # before splitting: the wanted sizes may leave some unused
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


def _demonstrations(
    source: Source, train: Sequence[Pair], limit: int, encoder: Encoder, dropped: Dropped
) -> Sequence[Demonstration]:
    """The bundled world's own, or the chosen replies of the train pairs, without repeats."""
    if source.demonstrations is not None:
        texts = list(_clean(source.demonstrations, read_demonstration, dropped))
        return encoder.demonstrations(texts[:limit])
    # one reply is often preferred to several others
    first = _first_of_each((p.prompt_text, p.chosen_text) for p in train)[:limit]
    return Stored.of(
        Demonstration,
        (
            Demonstration(p.prompt_text, p.chosen_text, p.prompt, p.chosen)
            for p in map(train.__getitem__, first)
        ),
    )


def _prompts(
    source: Source, pairs: dict[str, Sequence[Pair]], config: DataConfig, encoder: Encoder,
    dropped: Dropped,
) -> dict[str, Sequence[Prompt]]:  # fmt: skip
    """Each kind from the split it may be used with: the bundled world's own, or those of the pairs.

    The pairs' come without repeats. The world's are a sample of how often each is asked.
    """
    limits = {"train": config.rl_prompts, "validation": config.evaluation_prompts,
              "evaluation": config.evaluation_prompts}  # fmt: skip
    prompts: dict[str, Sequence[Prompt]] = {}
    for kind, limit in limits.items():
        if source.prompts:
            texts = list(_clean(source.prompts[kind], read_prompt, dropped))
            prompts[kind] = encoder.prompts(texts[:limit])
        else:
            rows = pairs["test" if kind == "evaluation" else kind]
            first = _first_of_each(p.prompt for p in rows)[:limit]  # equal once cut: equal
            prompts[kind] = Stored.of(
                Prompt, (Prompt(p.prompt_text, p.prompt) for p in map(rows.__getitem__, first))
            )
    return prompts


def _first_of_each(values: Iterable[object]) -> np.ndarray:
    """Where each distinct value stands first, in order. Keeps 16 bytes of a value."""
    digests = (hashlib.sha256(repr(value).encode()).digest()[:16] for value in values)
    return np.sort(np.unique(np.fromiter(digests, "S16"), return_index=True)[1])


def _clean(rows: Iterable[Row], read: Callable[[Row], T], dropped: Dropped) -> Iterator[T]:
    for row in rows:
        try:
            yield read(row)
        except Unusable as reason:
            dropped.add(str(reason), row.place)


def _check_filled(
    pairs: dict[str, Sequence[Pair]], config: DataConfig, source: Source, dropped: Dropped
) -> None:
    if empty := [split for split, rows in pairs.items() if not rows]:
        read = sum(len(rows) for rows in source.splits.values())
        raise DataError(
            f"{config.source}: no pair for {', '.join(empty)}. {read} rows were read; left out: "
            f"{dropped}. Ask for smaller splits (data.test_pairs ...), or give more pairs"
        )


def _hash(*parts: object) -> str:
    digest = hashlib.sha256()
    for piece in _json(parts):
        digest.update(piece.encode())
    return digest.hexdigest()


def _json(value: object) -> Iterator[str]:
    """The text of a JSON value piece by piece, each row of a sequence a piece of its own."""
    if isinstance(value, dict):
        for i, key in enumerate(sorted(value)):
            yield f"{',' if i else '{'}{json.dumps(key)}:"
            yield from _json(value[key])
        yield "}" if value else "{}"
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            yield "," if i else "["
            yield from _json(item)
        yield "]" if value else "[]"
    else:
        yield COMPACT.encode(value)


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


def subset(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair]:
    """`size` pairs drawn without replacement; a smaller subset lies within a larger one."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:size]]
