"""Preference data as the stages read it: cleaned, split by conversation, tokenised, audited.

`sources` reads rows with their places, `dialogues` turns a row into prompt and replies or says why
not, `encoding` makes token ids, `audit` measures what was found. Here they come together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_lib.audit import Dropped, describe
from rlhf_lib.batches import chunks
from rlhf_lib.config import DataConfig, SettingsError
from rlhf_lib.dialogues import Texts, Unusable, read_demonstration, read_pair, read_prompt
from rlhf_lib.encoding import CHUNK, Demonstration, Encoder, Pair, Prompt, paired_lengths, sides
from rlhf_lib.sources import DataError, Row, Source, read_source

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


@dataclass(frozen=True)
class PreferenceData:
    """All that the stages read, and what is known about it.

    `pairs`: "train", "validation", "test". `prompts`: "train" (for RL), "validation", "evaluation".
    `demonstrations` come from the train split. `hash` covers texts and token ids of all of them.
    """

    pairs: dict[str, list[Pair]]
    demonstrations: list[Demonstration]
    prompts: dict[str, list[Prompt]]
    audit: dict
    hash: str


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PreferenceData:
    """Read, clean, split and tokenise the pairs of `config.source`.

    Raises SettingsError for settings that cannot hold, DataError for data that cannot be used.
    """
    sizes = _sizes(config)
    encoder = Encoder(tokenizer, config.max_prompt_tokens, config.max_response_tokens)
    source = read_source(config.source)
    dropped, notes = Dropped(), []
    texts = {split: list(_clean(rows, read_pair, dropped)) for split, rows in source.splits.items()}
    shared = _shared_conversations(texts)
    if source.prompts:  # the bundled world was split when it was made
        pairs = {
            split: _fill(texts[split], {split: size}, encoder, dropped)[split]
            for split, size in sizes.items()
        }
    else:
        pairs = _split(texts, shared, sizes, config.split_seed, encoder, dropped, notes)
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
            kind: {"count": len(rows), "distinct": len({p.text for p in rows})}
            for kind, rows in prompts.items()
        },
        "notes": notes,
    }
    content = _hash(pairs, demonstrations, prompts)
    return PreferenceData(pairs, demonstrations, prompts, audit, content)


def _demonstrations(
    source: Source, train: Sequence[Pair], limit: int, encoder: Encoder, dropped: Dropped
) -> list[Demonstration]:
    """The bundled world's own, or the chosen replies of the train pairs, without repeats."""
    if source.demonstrations is not None:
        texts = list(_clean(source.demonstrations, read_demonstration, dropped))
        return encoder.demonstrations(texts[:limit])
    # one reply is often preferred to several others
    distinct = _distinct(train, lambda p: (p.prompt_text, p.chosen_text))
    return [
        Demonstration(p.prompt_text, p.chosen_text, p.prompt, p.chosen) for p in distinct[:limit]
    ]


def _prompts(
    source: Source, pairs: dict[str, list[Pair]], config: DataConfig, encoder: Encoder,
    dropped: Dropped,
) -> dict[str, list[Prompt]]:  # fmt: skip
    """Each kind from the split it may be used with: the bundled world's own, or those of the pairs.

    The pairs' come without repeats. The world's are a sample of how often each is asked.
    """
    limits = {"train": config.rl_prompts, "validation": config.evaluation_prompts,
              "evaluation": config.evaluation_prompts}  # fmt: skip
    prompts = {}
    for kind, limit in limits.items():
        if source.prompts:
            texts = list(_clean(source.prompts[kind], read_prompt, dropped))
            prompts[kind] = encoder.prompts(texts[:limit])
        else:
            rows = pairs["test" if kind == "evaluation" else kind]
            distinct = _distinct(rows, lambda p: tuple(p.prompt))  # equal once cut: equal
            prompts[kind] = [Prompt(p.prompt_text, p.prompt) for p in distinct[:limit]]
    return prompts


def _distinct(pairs: Iterable[Pair], key: Callable[[Pair], Hashable]) -> list[Pair]:
    """The first pair of each key, in order."""
    first: dict[Hashable, Pair] = {}
    for pair in pairs:
        first.setdefault(key(pair), pair)
    return list(first.values())


# ---------------------------------------------------------------------------------------- splits


def _sizes(config: DataConfig) -> dict[str, int]:
    sizes = {"test": config.test_pairs, "validation": config.validation_pairs,
             "train": config.train_pairs}  # fmt: skip
    if small := next((split for split, size in sizes.items() if size < 1), None):
        raise SettingsError(f"data.{small}_pairs={sizes[small]}: each split needs a pair at least")
    return sizes


def _clean(rows: Iterable[Row], read: Callable[[Row], T], dropped: Dropped) -> Iterator[T]:
    for row in rows:
        try:
            yield read(row)
        except Unusable as reason:
            dropped.add(str(reason), row.place)


def _shared_conversations(texts: dict[str, list[Texts]]) -> set[str]:
    """Conversations of the source's own test or validation split that its train split has too."""
    held_out = {t.conversation for split, rows in texts.items() if split != "train" for t in rows}
    return held_out & {t.conversation for t in texts["train"]}


def _split(
    texts: dict[str, list[Texts]], shared: set[str], sizes: dict[str, int], seed: int,
    encoder: Encoder, dropped: Dropped, notes: list[str],
) -> dict[str, list[Pair]]:  # fmt: skip
    """Test and validation first, train from the rest; a split that the source has is respected."""
    pairs: dict[str, list[Pair]] = {}
    sizes = dict(sizes)
    for own in ("test", "validation"):
        if own in texts:
            rows = _shuffled(texts[own], seed)
            taken = {p.conversation for split in pairs.values() for p in split}
            rows = [t for t in rows if t.conversation not in taken]
            pairs |= _fill(rows, {own: sizes.pop(own)}, encoder, dropped)
    rows = []
    for text in _shuffled(texts["train"], seed):
        if text.conversation in shared:
            dropped.add("conversation is held out", text.place)
        else:
            rows.append(text)
    if len(rows) < sum(sizes.values()):
        share = len(rows) / sum(sizes.values())
        notes.append(
            f"{len(rows)} usable pairs where {' + '.join(map(str, sizes.values()))} were wanted "
            f"({', '.join(sizes)}): each split got {share:.0%} of its size"
        )
        held_out = {s: max(1, int(size * share)) for s, size in sizes.items() if s != "train"}
        sizes = held_out | {"train": sizes["train"]}
    return pairs | _fill(rows, sizes, encoder, dropped)


def _shuffled(rows: Iterable[Texts], seed: int) -> list[Texts]:
    """In an order that depends on the conversation and the seed alone, not on the other rows."""
    return sorted(rows, key=lambda t: hashlib.sha256(f"{seed} {t.conversation}".encode()).digest())


def _fill(
    rows: Sequence[Texts], sizes: dict[str, int], encoder: Encoder, dropped: Dropped
) -> dict[str, list[Pair]]:
    """Splits of at most `sizes` pairs, filled in turn; a conversation stays in its first split."""
    pairs: dict[str, list[Pair]] = {split: [] for split in sizes}
    home: dict[str, str] = {}
    for batch in chunks(rows, CHUNK):
        for text, pair in zip(batch, encoder.pairs(batch), strict=True):
            unfilled = next((s for s, size in sizes.items() if len(pairs[s]) < size), None)
            if unfilled is None:
                return pairs
            if pair.chosen == pair.rejected:
                dropped.add("identical after truncation", text.place)
                continue
            split = home.setdefault(text.conversation, unfilled)
            if len(pairs[split]) < sizes[split]:
                pairs[split].append(pair)
    return pairs


def _check_filled(
    pairs: dict[str, list[Pair]], config: DataConfig, source: Source, dropped: Dropped
) -> None:
    if empty := [split for split, rows in pairs.items() if not rows]:
        read = sum(len(rows) for rows in source.splits.values())
        raise DataError(
            f"{config.source}: no pair for {', '.join(empty)}. {read} rows were read; left out: "
            f"{dropped}. Ask for smaller splits (data.test_pairs ...), or give more pairs"
        )


def _hash(*parts: object) -> str:
    text = json.dumps(parts, default=vars, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
