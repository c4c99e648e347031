"""Memory while `full`-size data is read: `python -m benchmarks.stream --rows 160000`.

Made-up dialogues in HH format (seeded random words) are written to a temporary file, and a process
of its own loads a sixteenth, a quarter and all of them and reads one epoch of batches. Its peak of
resident memory is counted above what it held before loading (imports and tokenizer).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

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


def measure(path: str, rows: int) -> dict[str, float]:
    """Load `rows` pairs in this process and read one epoch. Memory in MB (1e6 bytes)."""
    from rlhf_lib.data.batches import shuffled_batches
    from rlhf_lib.data.pairs import load_data
    from rlhf_lib.models.load import load_tokenizer
    from rlhf_lib.settings import DataConfig

    tokenizer = load_tokenizer("tiny")  # most made-up words are unknown to it: a token each
    tokenizer.model_max_length = 384  # no model reads these rows
    held_out = max(1, rows // 100)
    config = DataConfig(
        f"path:{path}", max_prompt_tokens=256, max_response_tokens=128, train_pairs=rows,
        validation_pairs=held_out, test_pairs=held_out, demonstrations=rows, rl_prompts=rows,
    )  # fmt: skip
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    data = load_data(config, tokenizer)
    loaded = time.perf_counter()
    pairs = data.pairs["train"]
    tokens = 0
    for batch in shuffled_batches(len(pairs), BATCH, epochs=1, seed=0):
        tokens += sum(len(pair.prompt) for pair in [pairs[i] for i in batch])
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": rows,
        "train_pairs": len(pairs),
        "prompt_tokens": tokens,
        "load_seconds": loaded - start,
        "loaded_rows_per_second": rows / (loaded - start),
        "epoch_seconds": end - loaded,
        "read_rows_per_second": len(pairs) / (end - loaded),
        "start_mb": before / 1e6,
        "peak_mb_above_start": (peak - before) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of loading many rows.")
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/stream.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the child's file
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows)))
        return
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            rows, path = options.rows // part, Path(folder) / "pairs.jsonl.gz"
            write_rows(path, rows)
            child = [sys.executable, "-m", "benchmarks.stream", "--measure", str(path)]
            done = subprocess.run(
                [*child, "--rows", str(rows)], check=True, stdout=subprocess.PIPE, text=True
            )
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(pd.DataFrame(records[-1:]).round(1).to_string(index=False), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
