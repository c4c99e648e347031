"""Traps 9, 11 and 19: what is cut out of a dialogue, into which tokens, and into which split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lib.data import dialogues, encoding, pairs
from rlhf_lib.data.audit import Dropped
from rlhf_lib.data.dialogues import TextPair
from rlhf_lib.data.encoding import Encoder, Pair
from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.sources import Row
from rlhf_lib.data.store import Stored
from rlhf_lib.settings import DataConfig
from rlhf_lib.world.grammar import ASSISTANT
from tests.traps.test_traps import Mistake, holds_unless, put_back

END = "<|end|>"


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """One token a character, and one for ":" with the space behind it: it reaches over the cut."""
    space = {"gpt2": "Ġ", "llama": "▁"}[family]
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), space, "\n"})
    pieces = {piece: i for i, piece in enumerate([*letters, f":{space}"])}
    tokenizer = Tokenizer(models.BPE(pieces, [(":", space)]))
    if family == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def dialogue(*turns: str) -> str:
    """Turns of human and assistant by turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def pair(*turns: str, chosen: str = "Yes.", rejected: str = "No!") -> dict[str, str]:
    return {"chosen": dialogue(*turns, chosen), "rejected": dialogue(*turns, rejected)}


def load(
    folder: Path, rows: Sequence[dict], family: str = "gpt2", **settings: int
) -> PreferenceData:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = {"max_prompt_tokens": 200, "max_response_tokens": 20}
    sizes = {"train_pairs": 20, "validation_pairs": 4, "test_pairs": 4}
    config = DataConfig(f"path:{folder / 'pairs.jsonl'}", **lengths | sizes | settings)
    return load_data(config, tokenizer_of(family))


def every_pair(loaded: PreferenceData) -> list[Pair]:
    return [p for rows in loaded.pairs.values() for p in rows]


# ------------------------------------------------------------------------------- 9: split dialogues


def cut_at_the_first_marker(patch: pytest.MonkeyPatch) -> None:
    """The first answer, and all that was said after it, is taken for the reply."""

    def split(text: str) -> tuple[str, str]:
        prompt, marker, reply = text.partition(ASSISTANT)
        if not marker:
            raise dialogues.Unusable("no assistant marker")
        return prompt + marker, reply.strip()

    patch.setattr(dialogues, "split_dialogue", split)


def cut_where_the_two_sides_part(patch: pytest.MonkeyPatch) -> None:
    """What chosen and rejected have in common is the prompt: half a reply, or nothing at all."""

    def read(row: Row) -> TextPair:
        chosen, rejected = row.values["chosen"], row.values["rejected"]
        same = 0
        while chosen[same : same + 1] == rejected[same : same + 1] != "":
            same += 1
        prompt = chosen[:same]
        key = dialogues.conversation_key(prompt)
        return TextPair(key, prompt, chosen[same:], rejected[same:], None, None, row.place)

    patch.setattr(pairs, "read_pair", read)


@put_back(cut_at_the_first_marker, cut_where_the_two_sides_part)
def test_trap_09_dialogues_are_cut_at_their_last_marker(
    mistake: Mistake | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [
        pair(f"Hi {i}", "Hello.", "A tree?", chosen="Oak.", rejected="No.") for i in range(9)
    ]
    alike = [pair(f"Q{i}?", chosen="Yes.", rejected="Yes. No.") for i in range(9)]
    unusable = [
        {"chosen": "nobody is", "rejected": "speaking"},
        # one side ends where the other goes on: its reply is an early turn of the other
        {"chosen": dialogue("A?", "B.", "C?", "D."), "rejected": dialogue("A?", "B.")},
    ]
    expected = {
        (f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: A tree?{ASSISTANT}", " Oak.", " No.")
        for i in range(9)
    } | {(f"\n\nHuman: Q{i}?{ASSISTANT}", " Yes.", " Yes. No.") for i in range(9)}
    with holds_unless(mistake, monkeypatch):
        loaded = load(tmp_path, several + alike + unusable, train_pairs=10)
        found = {(p.prompt_text, p.chosen_text, p.rejected_text) for p in every_pair(loaded)}
        assert found == expected
        reasons = {reason: row["count"] for reason, row in loaded.audit["dropped"].items()}
        assert reasons == {"no assistant marker": 1, "different prompts": 1}
        for split in loaded.audit["splits"].values():  # the rows a reader would see it in
            assert split["empty_prompts"] == 0
            assert split["tokens"]["prompt"]["min"] >= len(f"\n\nHuman: Q{ASSISTANT}") - 2


# ------------------------------------------------------------------------------- 11: token boundary


def prompt_and_reply_tokenised_together(patch: pytest.MonkeyPatch) -> None:
    """The reply is what is left of the whole after as many tokens as the prompt has alone."""

    def pairs(encoder: Encoder, texts: Sequence[TextPair]) -> list[Pair]:
        def ids(text: str) -> list[int]:
            return encoder.tokenizer(text)["input_ids"]

        rows = []
        for t in texts:
            start = len(ids(t.prompt))
            sides = ([*ids(t.prompt + r)[start:], encoder.eos] for r in (t.chosen, t.rejected))
            rows.append(Pair(t.conversation, t.prompt, t.chosen, t.rejected, ids(t.prompt), *sides))
        return rows

    patch.setattr(encoding.Encoder, "pairs", pairs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@put_back(prompt_and_reply_tokenised_together)
def test_trap_11_prompt_and_reply_are_tokenised_apart(
    family: str, mistake: Mistake | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(family)

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    assert len(ids("Assistant: Yes.")) < len(ids("Assistant:") + ids(" Yes.")), "nothing merges"
    with holds_unless(mistake, monkeypatch):
        for p in every_pair(load(tmp_path, [pair(f"Q{i}?") for i in range(20)], family)):
            end = [tokenizer.eos_token_id]
            assert p.prompt + p.chosen == ids(p.prompt_text) + ids(p.chosen_text) + end
            assert p.prompt + p.rejected == ids(p.prompt_text) + ids(p.rejected_text) + end
            assert tokenizer.decode(p.chosen) == p.chosen_text + END


# --------------------------------------------------------------------------------------- 19: splits


def _fill_in_turn(patch: pytest.MonkeyPatch, keep_identical: bool) -> None:
    """Splits are filled row by row, whatever conversation a row is of."""

    def fill(
        rows: Sequence[TextPair], sizes: dict[str, int], encoder: Encoder, dropped: Dropped
    ) -> dict[str, Stored[Pair]]:
        kept = iter([p for p in encoder.pairs(rows) if keep_identical or p.chosen != p.rejected])
        return {split: Stored.of(islice(kept, size)) for split, size in sizes.items()}

    patch.setattr(pairs, "fill", fill)


def rows_dealt_to_the_splits_in_turn(patch: pytest.MonkeyPatch) -> None:
    """Two rows of one conversation end up on both sides of a split."""
    _fill_in_turn(patch, keep_identical=False)


def conversations_told_apart_by_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    """A dialogue and its continuation count as two."""
    patch.setattr(
        dialogues, "conversation_key", lambda prompt: hashlib.sha256(prompt.encode()).hexdigest()
    )


@put_back(rows_dealt_to_the_splits_in_turn, conversations_told_apart_by_the_whole_prompt)
def test_trap_19_no_conversation_stands_in_two_splits(
    mistake: Mistake | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        pair(f"Q{i}?", *["And?", "More?"][: 2 * more], rejected=f"No {n}")
        for i in range(12)
        for more in (0, 1)
        for n in range(2)
    ]
    with holds_unless(mistake, monkeypatch):
        loaded = load(tmp_path, rows, train_pairs=30, validation_pairs=5, test_pairs=5)
        asked = {
            split: {p.prompt_text.split("\n\n")[1] for p in pairs}
            for split, pairs in loaded.pairs.items()
        }
        assert len(set().union(*asked.values())) == sum(map(len, asked.values()))


def pairs_equal_once_cut_are_kept(patch: pytest.MonkeyPatch) -> None:
    """Nothing can be learnt from two replies that agree as far as the model will read."""
    _fill_in_turn(patch, keep_identical=True)


@put_back(pairs_equal_once_cut_are_kept)
def test_trap_19_pairs_equal_once_cut_are_left_out_and_counted(
    mistake: Mistake | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair(f"Q{i}?") for i in range(12)]  # a conversation each
    same = [pair(f"S{i}?", chosen="y" * 30 + "1", rejected="y" * 30 + "2") for i in range(3)]
    with holds_unless(mistake, monkeypatch):
        loaded = load(tmp_path, rows + same)
        assert all(p.chosen != p.rejected for p in every_pair(loaded))
        assert loaded.audit["dropped"]["identical after truncation"]["count"] == 3
