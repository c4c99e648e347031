"""What chapters 01 to 03 say and tabulate: of pairs, of a judge made of them, and of imitation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from scipy.special import expit

from rlhf_lib.catalogue import label
from rlhf_lib.data.encoding import Pair, Prompt
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure import rankings
from rlhf_lib.measure.statistics import bootstrap, contrast, direction, interval
from rlhf_lib.show.tables import table_of
from rlhf_lib.show.training import update_panels
from rlhf_lib.world.grammar import last_request
from rlhf_lib.world.rewards import MAX_GOLD, observe

PARTS = ("helpful", "harmless", "honest", "style", "total")  # of the gold reward
# a reward model's score differences on test pairs, the pairs, and what is known of their labels
Judged = tuple[np.ndarray, Sequence[Pair], Truth | None]


def points(estimate: Mapping, digits: int = 1) -> str:
    """A share with its interval in percentage points."""
    return interval({end: 100 * estimate[end] for end in ("mean", "low", "high")}, digits)


# ----------------------------------------------------------------------------------- 1, the data


def stored(pair: Pair) -> pd.DataFrame:
    """Both sides of a pair as HH stores them, line breaks written out."""
    sides = {"chosen": pair.chosen_text, "rejected": pair.rejected_text}

    def text(side: str) -> str:
        return shorten(repr(pair.prompt_text + sides[side])[1:-1], 600)

    return table_of(sides, [("side", str), ("text", text)])


def reading(audit: Mapping) -> str:
    """How many rows were read, how many can be used, and what the reader noted."""
    said = [
        f"{audit['rows_read']} rows were read from {len(audit['files'])} file(s); "
        f"{audit['rows_usable']} are usable before splitting."
    ]
    if not audit["dropped"]:
        said.append(
            "No row had to be left out: this source is clean by construction or was cleaned before."
        )
    return " ".join([*said, *(f"Note: {note}." for note in audit["notes"])])


def left_out(audit: Mapping) -> pd.DataFrame:
    """The rows that were left out, by reason, with the places of the first few."""
    dropped = audit["dropped"]
    columns = [
        ("reason", str),
        ("rows", lambda reason: dropped[reason]["count"]),
        ("first places", lambda reason: "; ".join(dropped[reason]["first"][:3])),
    ]
    return table_of(dropped, columns)


def splits(audit: Mapping) -> pd.DataFrame:
    """Of each split: pairs, empty prompts, turns, mean words, and the share that was cut."""
    found = audit["splits"]

    def mean_words(side: str) -> Callable[[str], str]:
        return lambda split: f"{found[split]['words'][side]['mean']:.1f}"

    def cut(side: str) -> Callable[[str], str]:
        return lambda split: f"{found[split]['truncated_share'][side]:.1%}"

    columns = [
        ("split", str),
        ("pairs", lambda split: found[split]["pairs"]),
        ("empty prompts", lambda split: found[split]["empty_prompts"]),
        ("several turns", lambda split: f"{found[split]['multi_turn_share']:.0%}"),
    ]
    for side in ("prompt", "chosen", "rejected"):
        columns += [(f"{side}: words", mean_words(side)), (f"{side}: cut", cut(side))]
    return table_of([s for s in ("train", "validation", "test") if s in found], columns)


def one_line_judges(pairs: Mapping[str, Sequence[Pair]]) -> pd.DataFrame:
    """How often "the longer" and "the one that refuses" was chosen, split by split."""
    rows = []
    for split in ("train", "validation", "test"):
        longer = bootstrap(rankings.wins(rankings.length_preferences(pairs[split])))
        refusing = [
            (rankings.refuses(p.chosen_text), rankings.refuses(p.rejected_text))
            for p in pairs[split]
        ]
        differ = [float(chosen) for chosen, rejected in refusing if chosen != rejected]
        refusal = interval(bootstrap(differ) if differ else None, 1, percent=True)
        rows.append([split, interval(longer, 1, percent=True), len(differ), refusal])
    titles = ["split", "longer reply was chosen", "only one reply refuses"]
    return pd.DataFrame(rows, columns=[*titles, "of these, the refusal was chosen"])


def taste_for_length(pairs: Sequence[Pair]) -> str:
    """Whether the raters of these pairs like length."""
    longer = bootstrap(rankings.wins(rankings.length_preferences(pairs)))
    verdict = "cannot be told from indifferent to length"
    if longer["low"] > 0.5:
        verdict = "chose the longer reply more often than not"
    elif longer["high"] < 0.5:
        verdict = "chose the shorter reply more often than not"
    return f"On the training pairs, the raters {verdict}."


def each_kind(pairs: Sequence[Pair], truth: Truth) -> pd.DataFrame:
    """A pair of each kind of request, with the gold reward of both replies in its parts."""
    by_kind = {truth.kind(p.prompt_text): p for p in pairs}
    rows = []
    for kind, pair in sorted(by_kind.items()):
        for side, reply in (("chosen", pair.chosen_text), ("rejected", pair.rejected_text)):
            gold = truth.gold(pair.prompt_text, reply)
            request = shorten(last_request(pair.prompt_text), 100)
            row = {"kind": kind, "request": request, "label": side, "reply": shorten(reply, 110)}
            rows.append(row | {part: f"{getattr(gold, part):.2f}" for part in PARTS})
    return pd.DataFrame(rows)


def tastes(labelled: Mapping[str, tuple[Sequence[Pair], Truth]]) -> pd.DataFrame:
    """How often the reply with more of something was chosen by each annotator."""
    rows = []
    for name, (pairs, truth) in labelled.items():
        seen = [(observe(p.chosen_text), observe(p.rejected_text)) for p in pairs]
        more = {
            "higher gold": rankings.gold_preferences(pairs),
            "longer": np.array([a.length - b.length for a, b in seen]),
            "more polite words": np.array([a.polite - b.polite for a, b in seen]),
        }
        row = {"labelled by": name}
        for what, differences in more.items():
            found = bootstrap(rankings.wins(differences))
            row[f"{what} was chosen"] = interval(found, 1, percent=True)
        rows.append(row | {"best possible judge": f"{truth.ceiling(pairs):.1%}"})
    return pd.DataFrame(rows)


# --------------------------------------------------------------- updates, looked at: chapters 2, 3


def moves(updates: Sequence[tuple[Iterable, Iterable]], color: str, what: str) -> Figure:
    """A panel an update: where each thing stood before it, and by how much it was moved."""
    figure, axes = update_panels(len(updates), f"{what} before", "change by the update")
    for axis, sides in zip(axes, updates, strict=True):
        before, after = (np.asarray(side, dtype=float) for side in sides)
        axis.plot(before, after - before, ".", color=color, alpha=0.6, ms=5)
    return figure


def one_pair(seen: Sequence[tuple[float, float]]) -> pd.DataFrame:
    """A pair's two scores before and after each update, and what the loss makes of them."""
    columns = [
        ("", lambda i: f"after update {i}" if i else "before"),
        ("score of chosen", lambda i: f"{seen[i][0]:.3f}"),
        ("score of rejected", lambda i: f"{seen[i][1]:.3f}"),
        ("difference", lambda i: f"{seen[i][0] - seen[i][1]:.3f}"),
        ("P(chosen wins)", lambda i: f"{expit(seen[i][0] - seen[i][1]):.1%}"),
        ("loss", lambda i: f"{-np.log(expit(seen[i][0] - seen[i][1])):.3f}"),
        ("pull on the difference", lambda i: f"{expit(seen[i][1] - seen[i][0]):.3f}"),
    ]
    return table_of(range(len(seen)), columns)


def by_token(words: Sequence[str], seen: Sequence[Sequence[float]]) -> pd.DataFrame:
    """A reply token by token: log-prob and probability before, log-prob after each update."""

    def after(update: int) -> tuple[str, Callable[[int], str]]:
        return f"after update {update}", lambda t: f"{seen[update][t]:.2f}"

    columns = [
        ("token", lambda t: words[t]),
        ("log-prob before", lambda t: f"{seen[0][t]:.2f}"),
        ("probability before", lambda t: f"{np.exp(seen[0][t]):.1%}"),
        *(after(update) for update in range(1, len(seen))),
    ]
    return table_of(range(len(words)), columns)


# ----------------------------------------------------------------------------- 2, the reward model


def memory(metrics: Sequence[Mapping], preferences: np.ndarray) -> str:
    """Accuracy on the batches of late training against that on test pairs."""
    accuracy = [row["accuracy"] for row in metrics]
    late = float(np.mean(accuracy[-max(1, len(accuracy) // 4) :]))
    held_out = bootstrap(rankings.wins(preferences))
    text = "The training accuracy lies inside that interval."
    if late > held_out["high"]:
        text = "The training accuracy lies above it: some of what the model knows is memory."
    elif late < held_out["low"]:
        text = "The training accuracy lies below it."
    return (
        f"In the last quarter of training the model ranked {late:.1%} of the pairs of its batches "
        f"as labelled; on {len(preferences)} test pairs from conversations it never saw, "
        f"{interval(held_out, 1, percent=True)}. {text}"
    )


def between(accuracy: Mapping[str, Mapping], ceiling: float | None) -> str:
    """Where a reward model's accuracy stands between the bag of words and the ceiling."""
    difference = accuracy["reward_model_minus_bag_of_words"]
    said = (
        f"Reward model minus bag of words, on the same pairs: {points(difference)} percentage "
        f"points ({direction(difference)})."
    )
    if ceiling is None:
        return said
    reached = accuracy["reward_model"]
    way = {end: (reached[end] - 0.5) / (ceiling - 0.5) for end in ("mean", "low", "high")}
    covered = interval(way, 0, percent=True)
    return (
        f"{said} The ceiling is {ceiling:.1%}; {covered} of the way from chance to it is covered."
    )


def own_labels(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """Each reward model on test pairs that its own annotator labelled."""
    rows = []
    for name, (differences, pairs, truth) in judged.items():
        won = rankings.wins(differences)
        row = {"judge": label(name)}
        row["accuracy on its own labels"] = interval(bootstrap(won), 1, percent=True)
        if truth:
            row["ceiling"] = f"{truth.ceiling(pairs):.1%}"
            gold = rankings.gold_preferences(pairs)
            agrees = bootstrap(rankings.wins(differences * np.sign(gold))[gold != 0])
            row["agrees with the gold reward"] = interval(agrees, 1, percent=True)
        rows.append(row)
    return pd.DataFrame(rows)


def led_by_length(bins: Sequence[Mapping]) -> str:
    """The accuracy where the longer reply lost against where it won, from bins by length."""
    shorter, longer = bins[0], bins[-1]
    apart = shorter["high"] < longer["low"] or longer["high"] < shorter["low"]
    text = "The intervals overlap."
    if apart:
        text = "The intervals do not overlap: which reply is longer decides how well it does."
    return (
        "In the first of the bins by length the chosen reply has "
        f"{shorter['from']:.0f} to {shorter['to']:.0f} words more than the rejected one, and the "
        f"model agrees with {interval(shorter, 1, percent=True)} of the labels; in the last it has "
        f"{longer['from']:.0f} to {longer['to']:.0f} more, and the model agrees with "
        f"{interval(longer, 1, percent=True)}. {text}"
    )


def more_pairs(curve: Sequence[Mapping], smaller_seconds: float, full_seconds: float) -> str:
    """What the last training pairs brought, from the points of a learning curve."""
    if len(curve) < 2:
        return "There were too few training pairs for a smaller set of them."
    gain = curve[-1]["gain"]
    return (
        f"From {curve[-2]['train_pairs']:,} to {curve[-1]['train_pairs']:,} training pairs the "
        f"accuracy changed by {points(gain)} percentage points ({gain['verdict']}). The smaller "
        f"models took {smaller_seconds:.0f} s together, the full one {full_seconds:.0f} s."
    )


def confidence(preferences: np.ndarray, calibration: Mapping) -> str:
    """Whether a model is surer than it is right, and its ECE beside an honest model's."""
    gap = bootstrap(expit(np.abs(preferences)) - rankings.wins(preferences))
    verdicts = {
        "higher": "too sure of itself",
        "lower": "too modest",
        "not distinguishable": "neither too sure nor too modest, as far as this can tell",
    }
    honest = calibration["ece_if_honest"]
    return (
        f"Mean confidence minus accuracy on the test pairs is {points(gap)} percentage points: in "
        f"the mean, the model is **{verdicts[direction(gap)]}**. Its ECE is "
        f"{interval(calibration['ece'], 1, percent=True)}; an honest model of these confidences "
        f"would show {honest['mean']:.1%} on so many pairs, and stay under {honest['high']:.1%} "
        "nineteen times in twenty."
    )


def repair(repaired: Mapping) -> str:
    """What dividing by a temperature did to the ECE (`rankings.recalibrate`)."""
    temperature, change = repaired["temperature"], repaired["ece_change"]
    after = interval(repaired["after"]["ece"], 1, percent=True)
    verdicts = {
        "higher": "made it worse: the validation pairs are few, or not like the test pairs",
        "lower": "made it better",
        "not distinguishable": "cannot be told from no change",
    }
    return (
        f"The temperature fitted on {temperature['n']} validation pairs is "
        f"{interval(temperature)}. With it the ECE on the test pairs is {after}; the change of "
        f"{points(change)} percentage points {verdicts[direction(change)]}."
    )


def liking(score: np.ndarray, feature: np.ndarray) -> dict[str, float]:
    """Spearman's correlation over pairs, each once each way round, with its interval."""

    def both_ways(a: np.ndarray, b: np.ndarray) -> Any:
        return stats.spearmanr(np.r_[a, -a], np.r_[b, -b])[0]

    drawn = stats.bootstrap(
        (score, feature), both_ways, paired=True, vectorized=False, n_resamples=300,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = drawn.confidence_interval
    return {"mean": float(both_ways(score, feature)), "low": float(low), "high": float(high)}


def likings(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """What each judge's score goes along with; beside it what the gold reward does."""
    known = all(truth for *_, truth in judged.values())
    features: dict[str, Callable[[str], float]] = {
        "length (words)": lambda text: len(text.split()),
        "refusal": rankings.refuses,
    }
    if known:
        features["polite words"] = lambda text: observe(text).polite
    rows = []
    for feature, measure in features.items():
        row, gap, pairs = {"feature": feature}, np.zeros(0), []
        for name, (differences, pairs, _) in judged.items():
            texts = [(measure(p.chosen_text), measure(p.rejected_text)) for p in pairs]
            gap = np.array([float(a) - float(b) for a, b in texts])
            row[label(name)] = interval(liking(differences, gap)) if gap.any() else "–"
        if known:
            gold = rankings.gold_preferences(pairs)
            row["gold reward"] = interval(liking(gold, gap)) if gap.any() else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def fitted_weights(pairs: Sequence[Pair], differences: np.ndarray) -> np.ndarray:
    """Least squares of score differences on gold reward, polite words and words."""
    seen = [(observe(p.chosen_text), observe(p.rejected_text)) for p in pairs]
    style = [[a.polite - b.polite, a.length - b.length] for a, b in seen]
    columns = np.column_stack([rankings.gold_preferences(pairs), style])
    return np.linalg.lstsq(columns, differences, rcond=None)[0]


def weights(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """The weights of each annotator (known) and of the model that learnt from it (fitted)."""
    rows = []
    for name, (differences, pairs, truth) in judged.items():
        if truth is None:
            continue
        known = truth.annotator.gold, truth.annotator.polite, truth.annotator.length
        learnt = fitted_weights(pairs, differences)
        for who, (gold, polite, word) in (
            (f"annotator of the {label(name)}", known),
            (label(name), learnt),
        ):
            numbers = (gold, polite, word, polite / gold, word / gold)
            rows.append([who, *(f"{number:.3f}" for number in numbers)])
    titles = ["gold", "a polite word", "a word", "polite / gold", "word / gold"]
    return pd.DataFrame(rows, columns=["who", *titles])


# ------------------------------------------------------------------------------------ 3, imitation


def course_of_loss(metrics: Sequence[Mapping], result: Mapping) -> str:
    """What training on demonstrations took, and its loss at both ends."""
    losses = [row["loss"] for row in metrics]
    tenth = max(2, len(losses) // 10)
    loss = contrast(losses[:tenth], losses[-tenth:])
    entropy = np.mean([row["entropy"] for row in metrics[-tenth:]])
    return (
        f"{result['examples']} demonstrations, {len(losses)} steps, {result['seconds']:.0f} "
        f"seconds. The loss over the first tenth is {loss['first']:.2f}, over the last "
        f"{loss['last']:.2f} ({loss['word']}); the entropy there is {entropy:.2f}."
    )


def samples(
    prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]], truth: Truth | None
) -> pd.DataFrame:
    """One reply of each model to the first few prompts of each kind, not selected."""
    frame = pd.DataFrame(
        {
            "kind": [truth.kind(p.text) if truth else "all" for p in prompts],
            "request": [shorten(last_request(p.text), 160) for p in prompts],
            **{label(name): [shorten(t, 160) for t in said] for name, said in texts.items()},
        }
    )
    return frame.groupby("kind").head(2 if truth else 6).sort_values("kind", kind="stable")


def endings(
    replies: Mapping[str, Sequence[Sequence[int]]], texts: Mapping[str, Sequence[str]], eos: int
) -> pd.DataFrame:
    """Length, endings and variety of each model's replies."""

    def ended(name: str) -> str:
        return interval(bootstrap([r[-1] == eos for r in replies[name]]), 0, percent=True)

    columns = [
        ("model", label),
        ("length (tokens)", lambda n: interval(bootstrap([len(r) for r in replies[n]]), 1)),
        ("ended by itself", ended),
        ("different replies", lambda n: f"{len(set(texts[n])) / len(texts[n]):.0%}"),
    ]
    return table_of(replies, columns)


def gold_parts(
    prompts: Sequence[Prompt],
    texts: Mapping[str, Sequence[str]],
    replies: Mapping[str, Sequence[Sequence[int]]],
    eos: int,
    truth: Truth,
) -> tuple[pd.DataFrame, str]:
    """The gold reward of `base` and `sft` in its parts, and how much of it the second reaches."""
    golds = {
        name: [
            truth.gold(prompt.text, text, ids[-1] == eos)
            for prompt, text, ids in zip(prompts, texts[name], replies[name], strict=True)
        ]
        for name in ("base", "sft")
    }
    rows = []
    for part in PARTS:
        base, sft = (np.array([getattr(g, part) for g in golds[name]]) for name in golds)
        gain = bootstrap(sft - base)
        shown = (interval(bootstrap(values)) for values in (base, sft))
        rows.append([part, *shown, interval(gain), direction(gain)])
    titles = ["gold reward", "Base", "SFT", "SFT minus base", "verdict"]
    total = [gold.total for gold in golds["sft"]]
    poor = np.mean([value <= 0 for value in total])
    reached = f"SFT reaches {interval(bootstrap(total))} of at most {MAX_GOLD}"
    said = f"{reached} ({poor:.0%} of the replies earn nothing or less)."
    return pd.DataFrame(rows, columns=titles), said
