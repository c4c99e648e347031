"""How notebooks show what was measured: figures, tables and sentences with looked-up numbers."""

from __future__ import annotations

import base64
import inspect
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import shorten

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from scipy import stats
from transformers import PreTrainedTokenizerBase

from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.world.grammar import last_request

NAMES = {
    "base": "Base",
    "sft": "SFT",
    "sft_again": "SFT again",
    "rejection_sft": "Best-of-n SFT",
    "ppo": "PPO",
    "ppo_low_kl": "PPO, low KL",
    "grpo": "GRPO",
    "dpo": "DPO",
    "best_of_n_default": "best-of-n",
    "best_of_n_control": "best-of-n, unbiased labels",
    "reward_model": "reward model",
    "reward_model_control": "reward model, unbiased labels",
    "bag_of_words": "bag of words",
    "longer_wins": "longer wins",
    "learned_length": "length, direction learned",
    "gold": "gold reward",
    "dataset": "data",
    "evaluate": "evaluation",
    "probes": "probes",
    "second_opinion": "second opinion",
    "judge": "held-out judge",
    "reward_model_curve": "reward model, less data",
    "rloo": "RLOO",
    "ppo_strong": "PPO, high KL",
    "grpo_weak": "GRPO, low KL",
    "grpo_strong": "GRPO, high KL",
    "rloo_weak": "RLOO, low KL",
    "rloo_strong": "RLOO, high KL",
    "dpo_weak": "DPO, low beta",
    "dpo_strong": "DPO, high beta",
}

POLICIES = ("base", "sft", "rejection_sft", "ppo", "grpo", "dpo", "ppo_low_kl")  # as in tables
GAINERS = ("sft_again", *POLICIES[2:])  # what is compared with SFT; its second draw is the null


def show(figure: Figure, caption: str) -> None:
    """Display a figure as vector and bitmap, numbered and captioned in the report."""
    display(figure_bundle(figure), raw=True, metadata={"caption": caption, "kind": "figure"})


def table(frame: pd.DataFrame, caption: str) -> None:
    """Display a table without its index, numbered and captioned in the report."""
    display(table_bundle(frame), raw=True, metadata={"caption": caption, "kind": "table"})


def say(template: str, **values: object) -> None:
    """Display Markdown whose numbers are looked up: `say("{r[accuracy]:.1%}", r=...)`.

    Raises KeyError, which fails the notebook, for a number that was not measured.
    """
    display({"text/markdown": sentence(template, **values), "text/plain": template}, raw=True)


def source(function: object) -> None:
    """Display the library's own source of a function: the notebook cannot drift from it."""
    code = inspect.getsource(function).rstrip()  # type: ignore[arg-type]
    display({"text/markdown": f"```python\n{code}\n```", "text/plain": code}, raw=True)


def sentence(template: str, **values: object) -> str:
    """The template with every `{...}` looked up; raises KeyError naming what is missing."""
    try:
        return " ".join(template.format(**values).split())
    except (KeyError, IndexError, TypeError) as error:
        raise KeyError(f"no measurement for {error} in the sentence: {template[:80]!r}") from error


def figure_bundle(figure: Figure) -> dict[str, str]:
    """SVG and PNG of a figure; the SVG holds no date, so that equal figures give equal files."""
    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rlhf_lib"}):  # names within the file are drawn from it
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=120)
    encoded = base64.b64encode(png.getvalue()).decode()
    return {"image/svg+xml": svg.getvalue(), "image/png": encoded, "text/plain": "figure"}


def table_bundle(frame: pd.DataFrame) -> dict[str, str]:
    with pd.option_context("display.max_colwidth", None):  # pandas would cut replies off
        html = frame.to_html(index=False, border=0, na_rep="–")
    return {"text/html": html, "text/plain": frame.to_string(index=False)}


def markdown(frame: pd.DataFrame) -> str:
    """The frame as a Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def interval(estimate: Mapping | None, digits: int = 2, percent: bool = False) -> str:
    """`0.52 [0.41, 0.63]`; a lone value without interval; a dash where nothing is known."""
    if estimate is None:
        return "–"
    scale, unit = (100, "%") if percent else (1, "")
    mean = f"{scale * estimate['mean']:.{digits}f}{unit}"
    if estimate["low"] is None or estimate["low"] == estimate["high"]:
        return mean
    low, high = (f"{scale * estimate[key]:.{digits}f}" for key in ("low", "high"))
    return f"{mean} [{low}, {high}]"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


HEADLINE_CAPTION = (
    "Every policy on the same held-out prompts, 95 % intervals in brackets: {judge} reward, which "
    "decides, proxy reward, KL to SFT in nats a reply, and wins over SFT in {judge} reward."
)
COMPARISON_CAPTION = (
    "All policies on the same held-out prompts, 95 % intervals in brackets: proxy and gold reward, "
    "KL to SFT in nats a reply, win rates, length in tokens; minutes and peak memory of training."
)


def comparison_table(results: Mapping) -> pd.DataFrame:
    """The study's main table: one row a policy; what its columns mean: COMPARISON_CAPTION."""
    rows = []
    costs = results["cost"]
    for name in (p for p in POLICIES if p in results["policies"]):
        policy, cost = results["policies"][name], costs.get(name)
        row = {"policy": NAMES[name], "proxy": interval(policy["proxy"])}
        row |= {key: interval(policy[key]) for key in ("gold", "judge") if key in policy}
        row |= {
            "KL": interval(policy["kl"], 1),
            "wins vs SFT": interval(policy.get("win_rate_vs_sft"), 0, percent=True),
            "wins vs base": interval(policy.get("win_rate_vs_base"), 0, percent=True),
            "length": interval(policy["length"], 0),
            "min": f"{cost['seconds']['mean'] / 60:.1f}" if cost else "–",
            "GB": f"{cost['peak_memory_gb']['mean']:.1f}" if cost else "–",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def headline_table(results: Mapping) -> pd.DataFrame:
    """The study's main table for the first page: fewer columns, the reward that decides first."""
    shown = dict.fromkeys(("policy", results["judge"], "proxy", "KL", "wins vs SFT"))
    return comparison_table(results).loc[:, list(shown)]


def contrast(before: Sequence[float], after: Sequence[float]) -> dict[str, float | str]:
    """Means of two sets of training steps, and what their difference allows to say.

    `verdict` is "higher", "lower" or "not distinguishable", `word` the same as a verb, judged by
    Student's t at 95 % on the spread between steps. A rough rule: neighbouring steps resemble each
    other, and one run says nothing of another seed. A single step a side distinguishes nothing.
    """
    a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    difference, half = b.mean() - a.mean(), np.inf
    if min(len(a), len(b)) > 1:
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        half = stats.t.ppf(0.975, len(a) + len(b) - 2) * error
    verdict = "not distinguishable"
    if abs(difference) > half:
        verdict = "higher" if difference > 0 else "lower"
    verb = {"higher": "rose", "lower": "fell"}.get(verdict, "no clear change")
    return {
        "first": float(a.mean()), "last": float(b.mean()), "verdict": verdict, "word": verb,
    }  # fmt: skip


def quarters(metrics: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """A metric's values in the first and the last quarter of the steps at which it was logged."""
    values = [row[key] for row in metrics if key in row]
    size = max(1, len(values) // 4)
    return values[:size], values[-size:]


def change(metrics: Sequence[Mapping], key: str) -> dict[str, float | str]:
    """`contrast` of the last quarter of training with the first."""
    return contrast(*quarters(metrics, key))


def change_table(metrics: Sequence[Mapping], names: Mapping[str, str]) -> pd.DataFrame:
    """`change` of each named metric that was logged: one row a metric."""
    logged = set().union(*metrics)
    changes = {name: change(metrics, key) for key, name in names.items() if key in logged}
    return pd.DataFrame([
        {
            "": name,
            "first quarter": f"{record['first']:.3g}",
            "last quarter": f"{record['last']:.3g}",
            "change": record["word"],
        }
        for name, record in changes.items()
    ])  # fmt: skip


def replies(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, **first: object) -> pd.DataFrame:
    """A table of sampled replies: last human turn, reply, rewards; `first` adds leading columns."""
    rows = []
    asked = tokenizer.batch_decode(rollout.prompts)
    answered = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    for i, (prompt, reply) in enumerate(zip(asked, answered, strict=True)):
        turn = prompt.rpartition("Human:")[2].removesuffix("Assistant:")
        end = "" if rollout.finished[i] else " (cut)"
        row = first | {"prompt": shorten(turn, 90), "reply": shorten(reply, 180) + end}
        row["proxy"] = f"{rollout.scores[i]:.2f}"
        if rollout.gold is not None:
            row["gold"] = f"{rollout.gold[i]:.2f}"
        rows.append(row | {"log-ratio to SFT": f"{rollout.kl[i]:.1f}"})
    return pd.DataFrame(rows)


ERROR_RULES = {
    "label against gold": "the gold reward sides with the model against the label",
    "near tie": "score difference under a fifth of the typical one",
    "safety": "exactly one of the two replies refuses",
    "length-led": "the wrongly preferred reply is at least 1.5 times as long",
    "confidently wrong": "score difference over twice the typical one",
    "other": "none of these",
}


def error_counts(errors: Sequence[Mapping], gold_known: bool) -> pd.DataFrame:
    """How many of the reward model's errors (from `judges.errors`) fall into each category."""
    counts = Counter(error["category"] for error in errors)
    return pd.DataFrame([
        {
            "category": name,
            "rule (first that fits)": rule,
            "errors": counts[name],
            "share of errors": f"{counts[name] / max(1, len(errors)):.0%}",
        }
        for name, rule in ERROR_RULES.items()
        if gold_known or name != "label against gold"
    ])  # fmt: skip


def error_table(errors: Sequence[Mapping], pairs: Sequence, limit: int = 24) -> pd.DataFrame:
    """Errors to read: the most confident of each category, then the second most, up to `limit`."""
    by_category: dict[str, list[Mapping]] = {name: [] for name in ERROR_RULES}
    for error in errors:  # most confident first
        by_category[error["category"]].append(error)
    ranked = sorted(
        ((rank, error) for group in by_category.values() for rank, error in enumerate(group)),
        key=lambda item: item[0],
    )
    chosen = [error for _, error in ranked[:limit]]
    rows = []
    for error in sorted(chosen, key=lambda e: list(ERROR_RULES).index(e["category"])):
        pair = pairs[error["pair"]]
        rows.append({
            "category": error["category"],
            "request": shorten(last_request(pair.prompt_text), 90),
            "labelled better": shorten(pair.chosen_text, 90),
            "scored higher": shorten(pair.rejected_text, 90),
            "difference": f"{error['preference']:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)
