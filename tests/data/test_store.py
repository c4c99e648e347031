"""Records on disk read like a list, and loading data from them keeps memory flat."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_lib.data import pairs as data_module
from rlhf_lib.data.encoding import Pair, paired_lengths
from rlhf_lib.data.pairs import PreferenceData, load_data
from rlhf_lib.data.sources import DataError, Row
from rlhf_lib.data.store import READS, Stored, Writer
from rlhf_lib.settings import DataConfig

COUNT = 4 * READS + 7  # pages are let go in between


def record(i: int) -> Pair:
    margin, subset = (0.1 * i, None) if i % 2 else (None, "a part")
    ids = [list(range(i % 5)), [i, 2], list(range(i % 7))]
    return Pair(f"key {i % 9}", f"é\0 {i}", " yes\n", "", *ids, margin, subset)


@pytest.fixture(scope="module")
def both() -> tuple[Stored[Pair], list[Pair]]:
    plain = [record(i) for i in range(COUNT)]
    return Stored.of(plain), plain


def test_it_reads_like_the_list(both: tuple[Stored[Pair], list[Pair]]) -> None:
    stored, plain = both
    assert len(stored) == len(plain)
    assert list(stored) == plain
    for i in (0, 1, 70, COUNT - 1, -1, -COUNT, np.int64(5)):
        assert stored[i] == plain[i]
    for part in (slice(8), slice(-3, None), slice(60, 70), slice(None, None, -50)):
        assert stored[part] == plain[part]
    for outside in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            stored[outside]
    assert all(type(token) is int for pair in stored[:9] for token in pair.chosen)
    assert paired_lengths(stored) == paired_lengths(plain)


def test_it_may_be_empty() -> None:
    assert list(Stored.of([])) == list(Stored.of([]).select(np.zeros(0, int))) == []


def test_a_view_keeps_its_own_order(both: tuple[Stored[Pair], list[Pair]]) -> None:
    stored, plain = both
    order = np.random.default_rng(0).permutation(COUNT)[:100]
    view = stored.select(order)
    expected = [plain[i] for i in order]
    assert list(view) == expected
    assert view[-1] == expected[-1]
    assert view[3:5] == expected[3:5]
    assert list(view.select(np.array([7, 2]))) == [expected[7], expected[2]]


def test_a_row_may_hold_anything() -> None:
    values = {"chosen": [{"role": "user"}], "broken": "\ud800", "bytes": b"\0", "none": None}
    assert Stored.of([Row("a file", 3, values, None)])[0].values == values


# --------------------------------------------------------------------------------- loading data


def made_up(path: Path, count: int, words: int = 3) -> DataConfig:
    """HH rows: every fifth conversation comes twice, every seventh row is unusable."""
    rows = []
    for i in range(count):
        prompt = f"\n\nHuman: Q{i - (i % 5 == 1)} {'why ' * words}?\n\nAssistant:"
        reply = "" if i % 7 == 3 else f" a b {chr(97 + i % 26)}"
        rows.append({"chosen": prompt + reply, "rejected": f"{prompt} c", "margin": i / 8})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        f"path:{path}", 48, 16, count // 2, count // 10, count // 10, count, count, count
    )


def test_the_hash_covers_every_row_wherever_it_is_kept(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_data(made_up(tmp_path / "pairs.jsonl", 120), tiny_tokenizer)
    pairs = {split: list(rows) for split, rows in loaded.pairs.items()}
    demonstrations = list(loaded.demonstrations)
    prompts = {kind: list(rows) for kind, rows in loaded.prompts.items()}
    assert data_module._hash(pairs, demonstrations, prompts) == loaded.hash
    seen = {loaded.hash, data_module._hash(pairs, demonstrations[::-1], prompts)}
    for rows in (*pairs.values(), demonstrations, *prompts.values()):
        last = rows.pop()
        seen.add(data_module._hash(pairs, demonstrations, prompts))
        rows.append(last)
    assert len(seen) == 2 + 7


def test_loads_at_the_same_time_agree_and_leave_no_file(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made_up(tmp_path / "pairs.jsonl", 400)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load_data, config, tiny_tokenizer) for _ in range(3)]
        first, *others = [load.result() for load in loads]
    assert all((o.hash, o.audit) == (first.hash, first.audit) for o in others)
    assert not list(folder.iterdir())  # while the data is still in use


def test_a_load_that_fails_leaves_no_file(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made_up(tmp_path / "pairs.jsonl", 400)
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text() + "no JSON")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(DataError, match="line 401: not JSON"):
        load_data(config, tiny_tokenizer)
    assert not list(folder.iterdir())


def peak(load: Callable[[], PreferenceData]) -> int:
    """Most bytes that Python and numpy held while loading and reading every pair."""
    tracemalloc.start()
    try:
        for pair in load().pairs["train"]:
            assert pair.prompt
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1500, 6000)
    configs = [made_up(tmp_path / f"{n}.jsonl", n, words=20) for n in sizes]
    load_data(configs[0], tiny_tokenizer)  # what is imported and cached once is no row's memory
    few, many = (peak(lambda c=c: load_data(c, tiny_tokenizer)) for c in configs)
    assert many < 1.5 * few
    # and the test would see it: the rows of the sources alone, kept, are more than that
    monkeypatch.setattr(Writer, "append", lambda w, r: (KEPT.append(r), APPEND(w, r))[1])
    few, many = (peak(lambda c=c: load_data(c, tiny_tokenizer)) for c in configs)
    KEPT.clear()
    assert many > 2 * few


KEPT: list[object] = []
APPEND = Writer.append
