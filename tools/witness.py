"""Two checkouts run the same study on this machine, and all that they found is compared.

    python -m tools.witness BEFORE AFTER --profile smoke --runs FOLDER

Weights, metrics, samples and results of all stages, the evaluation, and the report's prose and
tables (not its code and figures). The exit code is 0 where every difference is `ALLOWED`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby, zip_longest
from pathlib import Path

import safetensors
import typer
from bs4 import BeautifulSoup

# What no two runs share: times, memory, what is divided by them, and hashes. Of values ...
TIMED = re.compile(
    r"/(\w*seconds?|phases|step_time|peak_memory_gb|per_minute)[/:]|^/(environment|stages)/"
)
TIMED_TEXT = re.compile(  # ... and in the report: in prose, columns, and rows of some tables
    r"\d[\d.,]*\s(minutes?|seconds?|s|GB)\b"
    r"|(?<=\| )(min|[^|:]*(minute|second|\bGB\b|hash)[^|:]*): [^|]*"
    r"|(?<=^budget: minutes).*|\| generation: .* all: .*|\| the rest: .* peak: .*"
)
NOT_COMPARED = {"config.json", "env.json"}  # of a stage: hashes and versions
RUNS = Path("runs/witness")
BLOCKS = ["h1", "h2", "h3", "h4", "p", "li", "pre", "figcaption", "summary", "tr"]

# (what stood there, what stands there today, why): compared under today's name
RENAMED = [
    ("/judge: ", "/deciding: ", "what decides has a name of its own, which is not `judge`"),
    ("/settings/judge/", "/settings/endpoint/", "an outside judge's settings are its endpoint's"),
    ("setting: judge.", "setting: endpoint.", "the same settings in the appendix"),
]
WORDS = r"\b(rose|fell|no clear change|higher|lower|not distinguishable)\b"  # for a change
# (pattern of a difference as it is printed, pattern of the part that may differ, why)
ALLOWED = [
    ("absent -> /settings/methods: ", ".*", "new setting: methods from outside the library"),
    ("absent -> /settings/(ppo|grpo)/reward: ", ".*", "new setting: what a method is rewarded by"),
    (r"absent -> setting: (ppo|grpo)\.reward \|", ".*", "the same settings in the appendix"),
    (r"failure_modes(\.json)?[:/].* -> absent", ".*", "no table read it: /probes has the modes"),
    (r"probes/result\.json: /counts/.* -> absent", ".*", "nobody read them; the rows are compared"),
    ("report/.*content hash", "[0-9a-f]{12}", "the data's hash is taken of its rows, not of JSON"),
    ("report/.*quarter", WORDS, "Welch's degrees of freedom in place of pooled ones"),
    (r"No outside judge was asked", r"(judge|endpoint)\.url", "the setting's name of today"),
    (r"absent -> budget: |: budget: .* -> absent", ".*", "rows come in the catalogue's order"),
    (r"group: enumeration .* error: .*e-16", r"[\d.]+e-16", "an error that is rounding alone"),
]


def run(checkout: Path, profile: str, folder: Path) -> None:
    """A whole study of a checkout, whose own modules come before an installed `rlhf_lib`."""
    command = [sys.executable, "-m", "rlhf_lib", "run", "--profile", profile, "--run-dir"]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    subprocess.run([*command, str(folder.resolve())], cwd=checkout, env=environment, check=True)


def weights(path: Path) -> Iterator[str]:
    """Type, shape and SHA-256 of every tensor: the file's own metadata do not matter."""
    for name, t in safetensors.deserialize(path.read_bytes()):
        yield f"/{name}: {t['dtype']} {t['shape']} {hashlib.sha256(t['data']).hexdigest()}"


def leaves(value: object, address: str = "") -> Iterator[str]:
    """JSON as lines, `/policies/ppo/kl/mean: 0.1`; an empty branch is a leaf."""
    branches = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(branches, dict) and branches:
        for key, branch in branches.items():
            yield from leaves(branch, f"{address}/{key}")
    else:
        yield f"{address}: {value!r}"


def blocks(page: str) -> Iterator[str]:
    """A report's headings, paragraphs, list items, captions and rows of tables, a line each."""
    soup = BeautifulSoup(page, "html.parser")
    for part in soup.select("head, nav, details.code, pre.sourceCode, annotation"):
        part.decompose()
    for table in soup.select("table"):
        heads = table.select("thead th")
        for row in table.select("tbody tr"):
            pairs = zip_longest(heads, row(["th", "td"]), fillvalue=soup.new_tag("td"))
            row.string = " | ".join(f"{h.get_text().strip()}: {c.get_text(' ')}" for h, c in pairs)
    strings = soup.find_all(string=True)
    for _, block in groupby(strings, key=lambda string: id(string.find_parent(BLOCKS))):
        if text := " ".join("".join(block).split()):
            yield TIMED_TEXT.sub("(time)", text)


READERS = {
    ".safetensors": weights,
    ".json": lambda path: leaves(json.loads(path.read_text())),
    ".jsonl": lambda path: leaves([json.loads(line) for line in path.read_text().splitlines()]),
    ".csv": lambda path: path.read_text().splitlines(),
    ".html": lambda path: blocks(path.read_text(encoding="utf-8")),
}


def measured(folder: Path) -> dict[str, list[str]]:
    """`{file: lines}` of the finished stages and the report; a stage's name has lost its hash."""
    found: dict[str, list[str]] = {}
    for parent in [*(done.parent for done in folder.glob("*-*/**/DONE")), folder / "report"]:
        name = re.sub("-[0-9a-f]{12}$", "", parent.relative_to(folder).as_posix())
        for path in parent.rglob("*.*"):
            part = path.relative_to(parent).as_posix()
            if path.suffix in READERS and part not in NOT_COMPARED:
                lines = [line for line in READERS[path.suffix](path) if not TIMED.search(line)]
                for old, new, _ in RENAMED:
                    lines = [line.replace(old, new) for line in lines]
                if f"{name}/{part}" in found:
                    raise SystemExit(f"{folder} has {name} twice: start from empty folders")
                found[f"{name}/{part}"] = lines if path.suffix == ".html" else sorted(lines)
    if "report/index.html" not in found:
        raise SystemExit(f"{folder} has no report: its study is not finished")
    return found


def differences(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """Lines that differ, each with what stands in its place."""
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            yield from zip_longest(before[i:j], after[k:m], fillvalue="absent")


def why_allowed(file: str, old: str, new: str) -> str | None:
    """The reason of the first rule that allows a difference."""
    for where, free, reason in ALLOWED:
        same = re.sub(free, "", old) == re.sub(free, "", new)
        if same and re.search(where, f"{file}: {old} -> {new}"):
            return reason
    return None


def compare(before: Path, after: Path) -> bool:
    """Print what two runs of a profile share and do not; True where every difference is allowed."""
    one, other, refused = measured(before), measured(after), 0
    for file in sorted({*one, *other}):
        old, new = one.get(file, []), other.get(file, [])
        digests = [hashlib.sha256(repr(side).encode()).hexdigest()[:16] for side in (old, new)]
        print("equal  " if old == new else "DIFFERS", *digests, file)
        for a, b in differences(old, new):
            reason = why_allowed(file, a, b)
            refused += reason is None
            print(f"  {reason or 'NOT ALLOWED'}: {a} -> {b}")
    print("\nNot compared: times, memory, what is divided by them, and hashes. Allowed:")
    print(*(f"- {what}: {reason}" for what, *_, reason in [*RENAMED, *ALLOWED]), sep="\n")
    print(f"\n{len(one)} files, {sum(map(len, one.values()))} values, {refused} not allowed")
    return refused == 0


def main(
    before: Path, after: Path, profile: str = "smoke", runs: Path = RUNS, reuse: bool = False
) -> None:
    """Run two checkouts in RUNS/before and RUNS/after, or --reuse what is there; compare both."""
    for name, checkout in (("before", before), ("after", after)):
        if not (reuse and (runs / name).exists()):
            (runs / name).mkdir(parents=True)  # an error where an older run is there
            run(checkout, profile, runs / name)
    raise SystemExit(not compare(runs / "before" / profile, runs / "after" / profile))


if __name__ == "__main__":
    typer.run(main)
