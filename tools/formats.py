"""Which formats of data are read, tried with an example of each.

    python -m tools.formats

writes the tables of `docs/data-and-models.md`: rows that are read or left out, files that are read
or refused, each with the reason.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import typer

from rlhf_lib.data.dialogues import Unusable, pair_up, read_demonstration, read_pair, unpaired
from rlhf_lib.data.sources import DataError, Row, read_source
from rlhf_lib.show.display import markdown
from tools.blocks import write_block

PAGE = Path("docs/data-and-models.md")
HI = "\n\nHuman: Hi\n\nAssistant:"
ASKED = {"role": "user", "content": "Hi"}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIRS: dict[str, dict | list[dict]] = {
    "HH: whole dialogues": {"chosen": f"{HI} Yo.", "rejected": f"{HI} No."},
    "prompt and replies": {"prompt": "Hi", "chosen": "Yo.", "rejected": "No."},
    "prompt and whole dialogues": {
        "prompt": "Hi",
        "chosen": f"{HI} Yo.",
        "rejected": f"{HI} No.",
    },
    "TRL, conversational": {
        "prompt": [ASKED],
        "chosen": [says("Yo.")],
        "rejected": [says("No.")],
    },
    "TRL, conversational, prompt inside": {
        "chosen": [ASKED, says("Yo.")],
        "rejected": [ASKED, says("No.")],
    },
    "TRL, unpaired (KTO)": [
        {"prompt": "Hi", "completion": "Yo.", "label": True},
        {"prompt": "Hi", "completion": "No.", "label": False},
    ],
    "scores of both": {
        "prompt": "Hi",
        "chosen": [ASKED, says("Yo.")],
        "rejected": [ASKED, says("No.")],
        "score_chosen": 8.0,
        "score_rejected": 5.5,
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yo."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "system and question": {
        "system": "Be brief.",
        "question": "Hi",
        "chosen": "Yo.",
        "rejected": "No.",
    },
    "last turn a human's": {"chosen": f"{HI} Yo.\n\nHuman: Bye", "rejected": f"{HI} No."},
    "a marker inside a reply": {
        "prompt": "Hi",
        "chosen": "A log:\n\nHuman: hi",
        "rejected": "No.",
    },
    "one side missing": {"chosen": f"{HI} Yo.", "rejected": None},
    "two prompts": {"chosen": f"{HI} Yo.", "rejected": "\n\nHuman: Bye\n\nAssistant: No."},
    "a tool's turn": {
        "prompt": [ASKED, {"role": "tool", "content": "sunny"}],
        "chosen": [says("Yo.")],
        "rejected": [says("No.")],
    },
    "an input beside the prompt": {
        "instruction": "Translate.", "input": "Bonjour", "chosen": "Hello.", "rejected": "No.",
    },
    "equal scores": {
        "prompt": "Hi", "chosen": "Yo.", "rejected": "No.", "score_chosen": 4, "score_rejected": 4,
    },
}  # fmt: skip
DEMONSTRATIONS: dict[str, dict] = {
    "prompt and completion": {"prompt": "Hi", "completion": "Yo."},
    "messages": {"messages": [ASKED, says("Yo.")]},
    "HH: a whole dialogue": {"text": f"{HI} Yo."},
}
LINE = json.dumps({"prompt": "Hi", "chosen": "Yo.", "rejected": "No."})
FILES: dict[str, bytes] = {
    "pairs.jsonl": LINE.encode(),
    "pairs.jsonl.gz": gzip.compress(LINE.encode()),
    "pairs.json": f"[{LINE}]".encode(),
    "pairs.csv": b"prompt,chosen,rejected\nHi,Yo.,No.\n",
    "pairs.tsv": b"prompt\tchosen\trejected\nHi\tYo.\tNo.\n",
    "packed.jsonl": gzip.compress(LINE.encode()),
    "utf16.jsonl": LINE.encode("utf-16"),
    "pointer.jsonl.gz": b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
    "page.jsonl": b"<!doctype html>",
    "pairs.txt": LINE.encode(),
}


def pair_table() -> pd.DataFrame:
    """A row a format of pairs: an example, and what is made of it."""
    return _table({name: (rows, lambda r=rows: _pair(r)) for name, rows in PAIRS.items()})


def demonstration_table() -> pd.DataFrame:
    def read(values: Mapping) -> str:
        prompt, reply = read_demonstration(Row("example", 1, dict(values)))
        return _shown(prompt, reply)

    return _table({name: (row, lambda r=row: read(r)) for name, row in DEMONSTRATIONS.items()})


def file_table() -> pd.DataFrame:
    """A row a kind of file."""
    rows = []
    with TemporaryDirectory() as folder:
        for name, content in FILES.items():
            path = Path(folder) / name
            path.write_bytes(content)
            rows.append({"file": f"`{name}`", "": _tried(lambda p=path: _file(p), folder)})
    return pd.DataFrame(rows)


def _table(tried: Mapping[str, tuple[object, Callable[[], str]]]) -> pd.DataFrame:
    rows = [
        {"format": name, "a row": f"`{json.dumps(example)}`", "": _tried(read)}
        for name, (example, read) in tried.items()
    ]
    return pd.DataFrame(rows)


def _tried(read: Callable[[], str], folder: str = "") -> str:
    try:
        return f"works: {read()}"
    except Unusable as reason:
        return f"left out, counted: {reason}"
    except DataError as error:
        return f"refused: {str(error).replace(f'{folder}/', '').partition('. ')[0]}"


def _pair(rows: dict | list[dict]) -> str:
    several = rows if isinstance(rows, list) else [rows]
    given = [Row("example", number, values) for number, values in enumerate(several, 1)]
    if unpaired(given[0].values):
        given = list(pair_up(given, lambda reason, place: None))
    pair = read_pair(given[0])
    margin = "" if pair.margin is None else f", margin {pair.margin}"
    return _shown(pair.prompt, pair.chosen, pair.rejected) + margin


def _file(path: Path) -> str:
    (row,) = read_source(f"path:{path}").splits["train"]
    pair = read_pair(row)
    return _shown(pair.prompt, pair.chosen, pair.rejected)


def _shown(*texts: str) -> str:
    return ", ".join(f"`{json.dumps(text)}`" for text in texts)


def main(page: Path = PAGE) -> None:
    """Try all formats and write the tables into the page."""
    write_block(page, "formats of pairs", markdown(pair_table()))
    write_block(page, "formats of demonstrations", markdown(demonstration_table()))
    write_block(page, "files", markdown(file_table()))


if __name__ == "__main__":
    typer.run(main)
