"""Every table: a list of columns, each a title and what stands under it for a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from rlhf_lib import catalogue
from rlhf_lib.catalogue import label
from rlhf_lib.data.encoding import Prompt
from rlhf_lib.files import read_jsonl
from rlhf_lib.measure.statistics import interval
from rlhf_lib.methods.rollout import Rollout
from rlhf_lib.results.policies import rewards
from rlhf_lib.runs import Stage, training_minutes
from rlhf_lib.world.grammar import last_request

COMPARED = ("null", "baseline", "method", "variant")  # roles of what is compared with SFT
Cell = Callable[[Any], object]
Column = tuple[str, Cell]


def table_of(rows: Iterable, columns: Iterable[Column]) -> pd.DataFrame:
    """A line for each of the rows; under each title what its cell makes of the row."""
    lines = list(rows)
    return pd.DataFrame({title: [cell(row) for row in lines] for title, cell in columns})


def named(row: Mapping) -> str:
    return label(row["name"])


def estimated(key: str, digits: int = 2, percent: bool = False) -> Cell:
    """The estimate under this key, with its interval; a KeyError where there is none."""
    return lambda row: interval(row[key], digits, percent)


def won(key: str) -> Cell:
    """A win rate; a dash where nobody was played against."""
    return lambda row: interval(row.get(key), 0, percent=True)


def spent(key: str, unit: float, digits: int) -> Cell:
    """Mean cost of a stage; a dash where nothing was trained."""
    return lambda row: f"{row[key]['mean'] / unit:.{digits}f}" if key in row else "–"


def short(value: float) -> str:
    """One decimal; below 1 two significant digits, so that little does not read as nothing."""
    if 0 < abs(value) < 0.995:
        return np.format_float_positional(value, 2, unique=False, fractional=False)
    return f"{value:.1f}"


def memory(gigabytes: float) -> str:
    """`1.2 GB`; below a tenth of that in MB."""
    return f"{1000 * gigabytes:.0f} MB" if gigabytes < 0.0995 else f"{short(gigabytes)} GB"


def trained_for(cost: Mapping) -> str:
    """Minutes of a policy's own stage, without what was done to measure."""
    if "seconds" not in cost:
        return "–"
    mean = {"seconds": cost["seconds"]["mean"], "phases": cost["phases"]}
    return short(training_minutes(mean))


def peak_memory(cost: Mapping) -> str:
    """The most that a stage had allocated; a dash where nothing was trained."""
    return memory(cost["peak_memory_gb"]["mean"]) if "peak_memory_gb" in cost else "–"


# ----------------------------------------------------------------------------------- policies

HEADLINE_CAPTION = (
    "Every policy on the same held-out prompts, 95 % intervals in brackets: {deciding} reward, "
    "which decides, proxy reward, KL to SFT in nats a reply, and wins over SFT in {deciding} "
    "reward, as they are and at equal length."
)
WINS = ("wins vs SFT", "at equal length")


def _measured(results: Mapping, names: Sequence[str]) -> list[dict]:
    """All measures of each of these policies that the study has."""
    policies = results["policies"]
    return [{"name": name, **policies[name]} for name in names if name in policies]


def comparison_table(results: Mapping) -> pd.DataFrame:
    """The study's main table: one row a policy, with what its training took."""
    rows, costs = _measured(results, catalogue.policies()), results["cost"]
    columns = [
        ("policy", named),
        ("proxy", estimated("proxy")),
        *((key, estimated(key)) for key in ("gold", "judge") if key in rows[0]),
        ("KL", estimated("kl", 1)),
        ("wins vs SFT", won("win_rate_vs_sft")),
        ("at equal length", won("length_controlled_vs_sft")),
        ("length", estimated("length", 0)),
        ("own minutes", trained_for),
        ("memory", peak_memory),
    ]
    return table_of([row | costs.get(row["name"], {}) for row in rows], columns)


def headline_table(results: Mapping) -> pd.DataFrame:
    """The study's main table for the first page: fewer columns, the reward that decides first."""
    shown = dict.fromkeys(("policy", results["deciding"], "proxy", "KL", *WINS))
    return comparison_table(results).loc[:, list(shown)]


def gain_table(results: Mapping) -> pd.DataFrame:
    """Gain over SFT of each policy, paired by prompt, every seed's value, and what may be said."""
    deciding, names = results["deciding"], catalogue.policies(*COMPARED)
    rows = [row | row[f"{deciding}_gain"] for row in _measured(results, names)]
    columns = [
        ("policy", named),
        (f"{deciding} gain over SFT", interval),
        ("each seed", lambda gain: ", ".join(f"{value:.2f}" for value in gain["per_seed"])),
        *_judged(),
        *([("proxy gain", estimated("proxy_gain"))] if deciding != "proxy" else []),
    ]
    return table_of(rows, columns)


def pair_table(results: Mapping) -> pd.DataFrame:
    """Each two of the compared methods: difference of the deciding reward, and what may be said."""
    rows = [{"pair": pair_name(key), **found} for key, found in results["comparisons"].items()]
    first = [("comparison", itemgetter("pair")), ("difference", interval)]
    return table_of(rows, [*first, *_judged()])


def request_table(results: Mapping, by: str) -> pd.DataFrame:
    """Gain over SFT by groups of requests, and what each adds to the whole gain.

    Beside kinds of request stands how often the reward model ranks their test pairs as labelled.
    """
    right = results["reward_model"].get("by_kind", {}) if by == "kind" else {}
    rows = [
        {"name": name, "group": group, "prompts": found["prompts"], "right": right.get(group)}
        | record
        for group, found in results["requests"][by].items()
        for name, record in found["policies"].items()
    ]
    rows.sort(key=lambda row: catalogue.policies().index(row["name"]))
    columns = [(by.replace("_", " "), itemgetter("group")), ("prompts", itemgetter("prompts"))]
    columns += [("gain there", estimated("gain")), ("part of the whole", estimated("part"))]
    if right:
        columns.append(("reward model right", estimated("right", 0, percent=True)))
    return table_of(rows, [("policy", named), *columns])


def moved(gains: Mapping[str, Mapping]) -> str:
    """In words: the kinds of request where a policy's gain has an interval without 0."""
    clear = {k: g for k, g in gains.items() if g["low"] > 0 or g["high"] < 0}
    words = {k: "more" if g["low"] > 0 else "less" for k, g in clear.items()}
    said = [f"{words[kind]} in {kind} ({interval(gain)})" for kind, gain in clear.items()]
    return ", ".join(said) or "no kind in which its interval leaves out 0"


def label_table(results: Mapping) -> pd.DataFrame:
    """What methods learn from labels with and without bias (`attribution`)."""
    rows = [{"name": n, **found} for n, found in results["attribution"]["policies"].items()]
    return table_of(rows, [("policy", named), *((w, estimated(w)) for w in list(rows[0])[1:])])


def pair_name(key: str) -> str:
    """`ppo_minus_dpo` as readers know it."""
    return " − ".join(label(name) for name in key.split("_minus_"))


def _judged() -> list[Column]:
    """The verdict after corrected p and the smallest difference that could be detected."""
    return [
        ("p (Holm)", lambda row: "<0.001" if (p := row["p_adjusted"]) < 0.001 else f"{p:.3f}"),
        ("detectable", lambda row: "–" if (d := row["detectable"]) is None else f"{d:.2f}"),
        ("verdict", itemgetter("verdict")),
    ]


def win_table(results: Mapping) -> pd.DataFrame:
    """Wins against SFT, base and the dataset's chosen reply, raw and at equal length."""
    others = {"sft": "SFT", "base": "base", "chosen": "chosen reply"}
    columns = [
        (f"vs {title}{suffix}", won(f"{key}_vs_{other}"))
        for other, title in others.items()
        for key, suffix in (("win_rate", ""), ("length_controlled", " (LC)"))
    ]
    return table_of(_measured(results, catalogue.policies()), [("policy", named), *columns])


def distance_table(results: Mapping) -> pd.DataFrame:
    """KL by three estimators, entropy, and perplexity of held-out texts."""
    rows = _measured(results, catalogue.policies())
    of_texts = [
        ("perplexity", estimated("perplexity")),
        ("more than SFT (nats)", lambda row: interval(row.get("forgetting"), 3)),
    ]
    columns = [
        ("policy", named),
        ("exact KL ± SE", lambda row: f"{row['kl']['mean']:.2f} ± {row['kl']['se']:.2f}"),
        ("KL by k1", estimated("kl_k1")),
        ("KL by k3", estimated("kl_k3")),
        ("entropy", estimated("entropy")),
        *(of_texts if any("perplexity" in row for row in rows) else []),
    ]
    return table_of(rows, columns)


def reply_table(results: Mapping) -> pd.DataFrame:
    """Length, endings, variety and repetition of each policy's replies."""
    columns = [
        ("policy", named),
        ("length", estimated("length", 1)),
        ("ended", estimated("finished", 1, percent=True)),
        ("distinct-1", estimated("distinct_1")),
        ("distinct-2", estimated("distinct_2")),
        ("repeated", estimated("repetition", 1, percent=True)),
    ]
    return table_of(_measured(results, catalogue.policies()), columns)


def spread_table(samples: Mapping[str, pd.DataFrame], deciding: str) -> pd.DataFrame:
    """Rewards and KL of single replies: mean ± standard deviation, a row a policy."""
    keys = {key: f"{key} reward" for key in rewards(deciding)} | {"kl": "KL"}

    def spread(values: pd.Series) -> str:
        mean, deviation = round(values.mean(), 2) + 0.0, values.std()
        return f"{mean:.2f} ± {deviation:.2f}" if deviation == deviation else "–"  # not of one

    return pd.DataFrame(
        {"policy": label(name)} | {title: spread(frame[key]) for key, title in keys.items()}
        for name, frame in samples.items()
    )


def opinion_table(results: Mapping) -> pd.DataFrame:
    """What two reward models say of each policy, where there were two (`second_opinion`)."""
    opinions = results["second_opinion"].items()
    rows = [{"name": name, **record, **record["excess"]} for name, record in opinions]
    columns = [
        ("policy", named),
        ("its own", estimated("own")),
        ("another seed's", estimated("other")),
        ("own less other", interval),
        *_judged(),
        ("disagree", estimated("opposite", 0, percent=True)),
    ]
    return table_of(rows, columns)


def endpoint_table(results: Mapping) -> pd.DataFrame:
    """What a model behind an endpoint said, where one was asked (`endpoint`)."""
    same = "same_in_both_orders"
    columns = [
        ("policy", named),
        ("wins over SFT", won("win_rate_vs_sft")),
        ("same in both orders", lambda row: f"{row[same]:.0%}" if same in row else "–"),
        ("no clear answer", itemgetter("unclear")),
    ]
    asked = results["endpoint"]["policies"].items()
    return table_of([{"name": name, **record} for name, record in asked], columns)


TRUST = {
    "labels": "agrees with the label",
    "gold": "agrees with the true reward",
    "same_in_both_orders": "agrees with itself in the other order",
    "first_place": "leans to the reply that is read first (below 0: to the second)",
    "longer": "leans to the longer reply, beyond what is right (below 0: to the shorter)",
}


def trust_table(trust: Mapping) -> pd.DataFrame:
    """How far a judge can be trusted (`endpoint.trust`)."""
    rows = [name for name in TRUST if name in trust]
    columns = [
        ("the judge", TRUST.__getitem__),
        ("share, 95 % interval over pairs", lambda name: interval(trust[name], 1, percent=True)),
        ("pairs", lambda name: trust[name]["n"]),
    ]
    return table_of(rows, columns)


# -------------------------------------------------------------------------------------- probes

ARROWS = {"higher": " ▲", "lower": " ▼", "not distinguishable": ""}


def probe_table(measured: Mapping[str, Mapping[str, Mapping]], percent: bool) -> pd.DataFrame:
    """One row a measure, one column a policy, from `failures` or `scores` of a study's probes.

    An arrow says where a policy differs from SFT.
    """

    def marked(record: Mapping) -> str:
        verdict = record.get("change", {}).get("verdict", "not distinguishable")
        return interval(record, 0 if percent else 2, percent) + ARROWS[verdict]

    def of(policy: str) -> Column:
        return label(policy), lambda measure: marked(measured[measure][policy])

    return table_of(measured, [("", str), *map(of, next(iter(measured.values())))])


def failure_sentences(failures: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """Of each candidate with an arrow in the table of failures: what it does more or less often."""
    verbs = {"higher": "more", "lower": "less"}
    said = []
    for measure, records in failures.items():
        for policy in (name for name in catalogue.candidates() if name in records):
            change = records[policy]["change"]
            if change["verdict"] in verbs:
                ends = sorted((abs(change["low"]), abs(change["high"])))  # both of one sign
                size = {"mean": abs(change["mean"]), "low": ends[0], "high": ends[1]}
                points = interval({end: 100 * value for end, value in size.items()}, 0)
                verb = verbs[change["verdict"]]
                said.append(
                    f"{label(policy)} fails **{verb} often** than SFT: {measure}, by {points} "
                    "points of a hundred."
                )
    return said or ["No candidate was shown to fail more or less often than SFT."]


def definition_table(definitions: Mapping[str, str], wanted: Sequence[str]) -> pd.DataFrame:
    """What each measure counts."""
    return table_of(wanted, [("measure", str), ("what counts", lambda name: definitions[name])])


def example_table(probes: Stage, policies: Sequence[str]) -> pd.DataFrame:
    """Replies side by side, a row a policy: each probe's first prompt on which the policies differ.

    Where they never differ it is the probe's first prompt. The first sample of each is shown.
    """
    sampled = {p: read_jsonl(probes.path / "samples" / f"{p}.jsonl") for p in policies}
    asked = pd.DataFrame(sampled[policies[0]]).drop_duplicates("id")

    def differ(place: int) -> bool:
        return len({rows[place]["failure"] for rows in sampled.values()}) > 1

    def once(text: Cell) -> Cell:
        return lambda row: text(row) if row["name"] == policies[0] else ""

    rows = []
    for _, prompts in asked.groupby("probe", sort=False):
        place = max(prompts.index, key=differ)  # the first of the greatest: True is above False
        rows += [sampled[policy][place] | {"name": policy} for policy in policies]
    columns = [
        ("probe", once(itemgetter("probe"))),
        ("request", once(lambda row: shorten(last_request(row["prompt"]), 90))),
        ("policy", named),
        ("reply", lambda row: shorten(row["response"], 140) + _cut(row["finished"])),
        ("fails", lambda row: "yes" if row["failure"] else "no"),
    ]
    return table_of(rows, columns)


def _cut(finished: object) -> str:
    return "" if finished else " (cut)"


# --------------------------------------------------------------- training, and what it leads to


def quarters(metrics: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """A metric's values in the first and the last quarter of the steps at which it was logged."""
    values = [row[key] for row in metrics if key in row]
    size = max(1, len(values) // 4)
    return values[:size], values[-size:]


def replies(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    **first: object,
) -> pd.DataFrame:
    """A table of sampled replies: last human turn, reply, rewards; `first` adds leading columns."""
    answered = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    gold = rollout.gold

    columns = [
        ("prompt", lambda i: shorten(last_request(prompts[i].text), 90)),
        ("reply", lambda i: shorten(answered[i], 180) + _cut(rollout.finished[i])),
        ("proxy", lambda i: f"{rollout.scores[i]:.2f}"),
        *([("gold", lambda i: f"{gold[i]:.2f}")] if gold is not None else []),
        ("log-ratio to SFT", lambda i: f"{round(float(rollout.kl[i]), 1) + 0.0:.1f}"),
    ]
    frame = table_of(range(len(prompts)), columns)
    return pd.DataFrame(first, index=frame.index).join(frame)


ERROR_RULES = {
    "label against gold": "the gold reward sides with the model against the label",
    "near tie": "score difference under a fifth of the typical one",
    "safety": "exactly one of the two replies refuses",
    "length-led": "the wrongly preferred reply is at least 1.5 times as long",
    "confidently wrong": "score difference over twice the typical one",
    "other": "none of these",
}


def bin_labels(rows: Sequence[Mapping], template: str) -> dict[str, Mapping]:
    """Rows of `statistics.by_bins` by name: `template` with {low} and {high} of the bin.

    Where two would get the same name, with as many digits as tell them apart.
    """
    named, digits = {template.format(low=row["from"], high=row["to"]): row for row in rows}, 2
    while len(named) < len(rows):
        digits += 1
        named = {f"{row['from']:.{digits}g} to {row['to']:.{digits}g}": row for row in rows}
    return named


def error_counts(errors: Sequence[Mapping], gold_known: bool) -> pd.DataFrame:
    """How many of the reward model's errors (`rankings.errors`) fall into each category."""
    counts = Counter(error["category"] for error in errors)
    columns = [
        ("category", str),
        ("rule (first that fits)", lambda name: ERROR_RULES[name]),
        ("errors", lambda name: counts[name]),
        ("share of errors", lambda name: f"{counts[name] / max(1, len(errors)):.0%}"),
    ]
    return table_of([n for n in ERROR_RULES if gold_known or n != "label against gold"], columns)


def error_table(errors: Sequence[Mapping], pairs: Sequence, limit: int = 24) -> pd.DataFrame:
    """Errors to read: the most confident of each category, then the second most, up to `limit`."""
    frame = pd.DataFrame(list(errors), columns=["pair", "preference", "category"])
    frame["place"] = frame["category"].map(list(ERROR_RULES).index)
    frame["rank"] = frame.groupby("category").cumcount()  # errors come most confident first
    shown = frame.sort_values(["rank", "place"]).head(limit).sort_values(["place", "rank"])
    columns = [
        ("category", itemgetter("category")),
        ("request", lambda row: shorten(last_request(pairs[row["pair"]].prompt_text), 90)),
        ("labelled better", lambda row: shorten(pairs[row["pair"]].chosen_text, 90)),
        ("scored higher", lambda row: shorten(pairs[row["pair"]].rejected_text, 90)),
        ("difference", lambda row: f"{row['preference']:.2f}"),
    ]
    return table_of(shown.to_dict("records"), columns)
