"""The README's numbers: blocks between markers, filled from stored JSON.

<!-- results: offline -->  ... whatever stands here is replaced ...  <!-- end -->

`results: NAME` is a study, `figures/NAME/results.json`; `benchmark: NAME` a comparison with peers,
`benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from rlhf_lib import verdict
from rlhf_lib.display import comparison_table, interval

LINK = re.compile(r"\]\(([^)]+)\)")
BLOCK = re.compile(r"(<!-- results: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BENCHMARK = re.compile(r"(<!-- benchmark: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# items a second of this library over the peer's, in one run
TARGETS = {
    "cpu": {"dpo": 6.0, "sft": 4.0, "reward_model": 2.5, "grpo": 4.0},
    "gpu": {"dpo": 2.0, "sft": 2.0, "reward_model": 2.0, "grpo": 2.0, "generation": 5.0},
}
TRAINING = ("sft", "reward_model", "dpo")  # stages that only train: half of the roof is wanted
ROOF_TARGET = 0.5


def fill(text: str, figures: Path, benchmarks: Path | None = None) -> str:
    """`text` with every block filled anew from its JSON.

    `benchmarks` is where the comparisons lie: where it is left out, `benchmarks/results` beside
    `figures`. A study that is missing is an error; a comparison belongs to one machine, and where
    nobody has run it yet the block says so.
    """
    measured = benchmarks or figures.parent / "benchmarks" / "results"

    def block(match: re.Match[str]) -> str:
        results = json.loads((figures / match[2] / "results.json").read_text())
        return f"{match[1]}\n{summary(results)}\n\n{match[3]}"

    def benchmark(match: re.Match[str]) -> str:
        path = measured / f"{match[2]}.json"
        shown = f"Not measured yet: there is no `{path.name}` in `benchmarks/results`."
        if path.exists():
            shown = benchmark_summary(json.loads(path.read_text()))
        return f"{match[1]}\n{shown}\n\n{match[3]}"

    return BENCHMARK.sub(benchmark, BLOCK.sub(block, text))


def summary(results: Mapping) -> str:
    """Verdict, judges of pairs, and policies of one study, as Markdown."""
    parts = [*verdict.sentences(results), _markdown(_judges(results))]
    parts.append(_markdown(comparison_table(results)))
    return "\n\n".join(parts)


def _judges(results: Mapping) -> pd.DataFrame:
    accuracy = results["reward_model"]["accuracy"]
    names = {
        "reward_model": "reward model", "bag_of_words": "bag of words (TF-IDF, logistic)",
        "learned_length": "length, direction learned", "longer_wins": "longer wins",
        "gold": "gold reward",
    }  # fmt: skip
    rows = [
        {"judge of held-out pairs": label, "accuracy": interval(accuracy[key], 1, percent=True)}
        for key, label in names.items()
        if key in accuracy
    ]
    ceiling = results["reward_model"].get("ceiling")
    if ceiling:
        rows.append({"judge of held-out pairs": "reachable ceiling", "accuracy": f"{ceiling:.1%}"})
    return pd.DataFrame(rows)


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def benchmark_summary(results: Mapping) -> str:
    """What was compared on which machine, the table of stages, and the targets, as Markdown."""
    env, settings, stages = results["environment"], results["settings"], results["stages"]
    tokens = settings["mean_tokens"]
    machine = env["gpu"] or f"{env['cpu_cores']} CPU cores, {env['threads']} threads"
    head = (
        f"{machine}; {settings['precision']}; matmul roof "
        f"{results['roof']['flops_per_second'] / 1e9:,.0f} GFLOP/s. A round has "
        f"{settings['pairs']} pairs (mean tokens: prompt {tokens['prompt']:.0f}, chosen "
        f"{tokens['chosen']:.0f}, rejected {tokens['rejected']:.0f}) in batches of "
        f"{settings['batch_size']}, or {settings['samples']} samples of "
        f"{settings['max_new_tokens']} new tokens at most in steps of "
        f"{settings['samples_per_step']}; {settings['rounds']} rounds each, in turn. Peers: TRL "
        f"{results['peer_packages']['trl']}, transformers "
        f"{results['peer_packages']['transformers']}."
    )
    parts = [head, _markdown(benchmark_table(results)), *_benchmark_targets(stages)]
    if "prediction" in results:
        parts.append(prediction_summary(results["prediction"]))
    return "\n\n".join(parts)


def benchmark_table(results: Mapping) -> pd.DataFrame:
    """One row a stage: both sides' rates and memory, the ratio with its interval, the target."""
    targets = TARGETS["gpu" if results["environment"]["gpu"] else "cpu"]
    rows = []
    for stage, record in results["stages"].items():
        ours, theirs = record["library"], record["peer"]
        rows.append({
            "stage": stage.replace("_", " "),
            "peer": record["peer_name"],
            "items/s": _range(ours["items_per_second"]),
            "peer's": _range(theirs["items_per_second"]),
            "tokens/s": f"{ours['tokens_per_second']['median']:,.0f}",
            "of the roof": f"{ours['roof_share']['median']:.0%}",
            "peer's share": f"{theirs['roof_share']['median']:.0%}",
            "GB": f"{ours['peak_memory_gb']:.1f}",
            "peer's GB": f"{theirs['peak_memory_gb']:.1f}",
            "ratio": interval(record["ratio"], 1),
            "target": _target(record["ratio"], targets.get(stage)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _range(spread: Mapping) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"


def _target(ratio: Mapping, wanted: float | None) -> str:
    """Reached or missed where the whole interval lies on one side, and undecided elsewhere."""
    if wanted is None:
        return "–"
    if ratio["low"] >= wanted:
        verdict = "reached"
    else:
        verdict = "missed" if ratio["high"] < wanted else "undecided"
    return f"≥ {wanted:g}: {verdict}"


def _benchmark_targets(stages: Mapping) -> list[str]:
    """The two targets that are no ratio of speed: share of the roof, and memory."""
    training = {stage: stages[stage] for stage in TRAINING if stage in stages}
    shares = {s: r["library"]["roof_share"]["median"] >= ROOF_TARGET for s, r in training.items()}
    memory = {stage: record["memory_ratio"] <= 1 for stage, record in stages.items()}
    return [
        f"Target, {ROOF_TARGET:.0%} of the roof in training steps: {_reached(shares)}.",
        f"Target, no more memory than the peer: {_reached(memory)}.",
        "The roof is the best matrix product of the model's own shapes. Both sides are credited "
        "with the same work: each prompt once, every reply, no padding, and the output layer at "
        "reply tokens only. Ratios are of items a second, geometric means with 95 % intervals over "
        "rounds; rates are medians with their range.",
    ]


def _reached(stages: Mapping[str, bool]) -> str:
    parts = [
        f"{word} for {', '.join(name.replace('_', ' ') for name in names)}"
        for word, wanted in (("reached", True), ("missed", False))
        if (names := [stage for stage, held in stages.items() if held is wanted])
    ]
    return "; ".join(parts) or "not measured"


def prediction_summary(prediction: Mapping) -> str:
    """Work and time of each stage of a profile, and what they were derived from, as Markdown."""
    rows = [
        {
            "stage": row["stage"].replace("_", " "),
            "items": f"{row['items']:,}",
            "PFLOP": f"{row['flops'] / 1e15:,.1f}",
            "hours": _hours(row["hours"]),
        }
        for row in prediction["stages"]
    ]
    total = {"stage": "all, one seed", "items": "", "PFLOP": f"{prediction['flops'] / 1e15:,.1f}",
             "hours": _hours(prediction["hours"])}  # fmt: skip
    text = (
        f"Profile `{prediction['profile']}` with GPT-2: FLOPs counted from its settings, and hours "
        f"at the rates above ({prediction['device']})."
    )
    if prediction["gpu"] is None:
        text += " No GPU was measured: the FLOPs hold for any device, the hours are this CPU's."
    return f"{text}\n\n{_markdown(pd.DataFrame([*rows, total]))}"


def _hours(hours: float | None) -> str:
    return "not measured" if hours is None else f"{hours:,.1f}"
