"""Memory while `full`-size data is read.

Made-up dialogues in HH format (seeded random words) are written to a temporary file, and a process
of its own loads a sixteenth, a quarter and all of them and reads one epoch of batches. Its peak of
resident memory is counted above what it held before loading (imports and tokenizer).
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil

from benchmarks.protocol import resident_peak_gb, timed

BATCH = 64
PARTS = (16, 4, 1)  # what share of the rows is read: one in so many


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """`count` pairs of one to three turns; one conversation in twenty is asked again."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]

    def says(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

    asked: list[str] = []
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(count):
            first = rng.choice(asked) if asked and rng.random() < 0.05 else says(5, 25)
            asked = [*asked[-99:], first]
            prompt = f"\n\nHuman: {first}\n\nAssistant:"
            for _ in range(rng.randrange(3)):
                prompt += f" {says(10, 40)}\n\nHuman: {says(5, 20)}\n\nAssistant:"
            sides = {side: f"{prompt} {says(5, 60)}" for side in ("chosen", "rejected")}
            file.write(json.dumps(sides) + "\n")


def measure(rows: int, say: Callable[[str], None]) -> list[dict]:
    """A record for each share of the rows, every one of a process of its own."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            path = Path(folder) / "pairs.jsonl.gz"
            write_rows(path, rows // part)
            child = [sys.executable, "-m", "benchmarks.stream", str(path), str(rows // part)]
            done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
            say(pd.DataFrame(records[-1:]).round(1).to_string(index=False))
    return records


def load(path: str, rows: int) -> dict[str, float]:
    """Load `rows` pairs in this process and read one epoch. Memory in MB (1e6 bytes)."""
    from rlhf_lib.data.batches import shuffled_batches
    from rlhf_lib.data.pairs import load_data
    from rlhf_lib.models.load import load_tokenizer
    from rlhf_lib.settings import DataConfig

    tokenizer = load_tokenizer("tiny")  # most made-up words are unknown to it: a token each
    tokenizer.model_max_length = 384  # no model reads these rows
    taken = dict.fromkeys(("train_pairs", "demonstrations", "rl_prompts"), rows)
    held_out = dict.fromkeys(("validation_pairs", "test_pairs"), max(1, rows // 100))
    limits = {"max_prompt_tokens": 256, "max_response_tokens": 128}
    config = DataConfig(f"path:{path}", **limits, **taken, **held_out)
    before = psutil.Process().memory_info().rss / 1e6
    loading, data = timed(load_data, config, tokenizer)
    pairs = data.pairs["train"]

    def read() -> int:
        batches = shuffled_batches(len(pairs), BATCH, epochs=1, seed=0)
        return sum(len(pairs[i].prompt) for batch in batches for i in batch)

    reading, tokens = timed(read)
    return {
        "rows": rows,
        "train_pairs": len(pairs),
        "prompt_tokens": tokens,
        "load_seconds": loading,
        "loaded_rows_per_second": rows / loading,
        "epoch_seconds": reading,
        "read_rows_per_second": len(pairs) / reading,
        "start_mb": before,
        "peak_mb_above_start": 1e3 * resident_peak_gb() - before,
    }


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1], int(sys.argv[2]))))
