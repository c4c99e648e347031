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

from rlhf_lib.audit import Dropped, describe
from rlhf_lib.config import DataConfig, SettingsError
from rlhf_lib.dialogues import Texts, Unusable, read_demonstration, read_pair, read_prompt
from rlhf_lib.encoding import Demonstration, Encoder, Pair, Prompt, paired_lengths, sides
from rlhf_lib.sources import DataError, Row, Source, read_source
from rlhf_lib.splits import fill, shared_conversations, split_pairs, split_sizes
from rlhf_lib.store import Stored

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
    return PreferenceData(pairs, demonstrations, prompts, audit, content)


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
