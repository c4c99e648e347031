"""Who can tell the preferred reply: the reward model, simple baselines, and the reachable ceiling.

A ranker gives each pair a number: positive when it prefers the chosen reply, 0 for a tie, which is
half a win.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import optimize, stats
from scipy.sparse import csr_matrix, diags_array
from scipy.special import expit

from rlhf_lib.data.dialogues import turns
from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.truth import Truth
from rlhf_lib.measure.statistics import LEVEL, bootstrap, by_group, resampled, share
from rlhf_lib.world.rewards import gold_reward

REFUSAL = ("sorry", "cannot", "can't", "won't", "unable", "not able", "not comfortable")


def wins(preferences: np.ndarray) -> np.ndarray:
    """1 where the chosen reply is preferred, 0.5 for a tie, 0 where it is not."""
    return (preferences > 0) + 0.5 * (preferences == 0)


def length_preferences(pairs: Sequence[Pair]) -> np.ndarray:
    """Prefers the longer reply (characters)."""
    return np.array([float(len(p.chosen_text) - len(p.rejected_text)) for p in pairs])


def bag_of_words_preferences(train: Sequence[Pair], test: Sequence[Pair]) -> np.ndarray:
    """TF-IDF of words and word pairs, logistic regression on the difference of the two replies.

    Of letters, where words say nothing: a script without spaces, replies of one letter. One pair
    teaches nothing that a second would be told apart by: then all are ties.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    if len(train) < 2:
        return np.zeros(len(test))
    vectorizer = _bag([text for p in train for text in (p.chosen_text, p.rejected_text)])

    def differences(pairs: Sequence[Pair]) -> csr_matrix:
        chosen = vectorizer.transform([p.chosen_text for p in pairs])
        return csr_matrix(chosen - vectorizer.transform([p.rejected_text for p in pairs]))

    # every other pair is turned round, so that there are two classes to tell apart
    signs = np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    model.fit(diags_array(signs) @ differences(train), signs)
    return model.decision_function(differences(test))


def _bag(texts: Sequence[str]) -> Any:
    """A fitted vectorizer of words, or of up to three letters where half of the texts have none."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    tokens, seen = words.build_analyzer(), Counter[str]()
    said = [set(tokens(text)) for text in texts]
    for each in said:
        seen.update(each)
    if 2 * sum(any(seen[word] > 1 for word in each) for each in said) >= len(texts):
        return words.fit(texts)
    letters = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    return letters.fit(texts)


def learned_length_preferences(train: Sequence[Pair], test: Sequence[Pair]) -> np.ndarray:
    """Prefers longer or shorter replies, whichever won more of the training pairs."""
    direction = 1.0 if wins(length_preferences(train)).mean() >= 0.5 else -1.0
    return direction * length_preferences(test)


def gold_preferences(pairs: Sequence[Pair]) -> np.ndarray:
    """Difference of the gold rewards (bundled world), rounded so that equal rewards do tie."""
    differences = [
        gold_reward(p.prompt_text, p.chosen_text).total
        - gold_reward(p.prompt_text, p.rejected_text).total
        for p in pairs
    ]
    return np.round(differences, 9)


def accuracies(
    train: Sequence[Pair],
    test: Sequence[Pair],
    reward_preferences: Sequence[np.ndarray],
    truth: Truth | None,
    samples: int = 2000,
) -> dict[str, dict]:
    """Accuracy of each ranker on the test pairs, with a bootstrap interval over pairs.

    `reward_preferences`: the reward model's, one array per seed; its wins are averaged over seeds.
    """
    rankers = {
        "reward_model": np.mean([wins(p) for p in reward_preferences], axis=0),
        "bag_of_words": wins(bag_of_words_preferences(train, test)),
        "longer_wins": wins(length_preferences(test)),
        "learned_length": wins(learned_length_preferences(train, test)),
    }
    if truth:
        rankers["gold"] = wins(gold_preferences(test))
    table = {name: bootstrap(values, samples) for name, values in rankers.items()}
    table["reward_model"]["per_seed"] = [float(wins(p).mean()) for p in reward_preferences]
    difference = rankers["reward_model"] - rankers["bag_of_words"]
    table["reward_model_minus_bag_of_words"] = bootstrap(difference, samples)
    return table


def word_differences(pairs: Sequence[Pair]) -> np.ndarray:
    """Words of the chosen reply less words of the rejected one."""
    return np.array([len(p.chosen_text.split()) - len(p.rejected_text.split()) for p in pairs])


def _ece(preferences: np.ndarray, bins: int, won: np.ndarray | None = None) -> np.ndarray:
    """Expected calibration error along the last axis."""
    confidence = expit(np.abs(preferences))
    gaps = confidence - (wins(preferences) if won is None else won)
    order = np.argsort(confidence, axis=-1, kind="stable")
    parts = np.array_split(np.take_along_axis(gaps, order, -1), bins, axis=-1)
    return sum(np.abs(part.sum(-1)) for part in parts) / confidence.shape[-1]


def _interval(columns: Sequence[np.ndarray], statistic: Callable, samples: int) -> dict:
    """A statistic of pairs with its percentile-bootstrap interval; one pair shows no spread."""
    mean = low = high = float(statistic(*columns))
    if len(columns[0]) > 1:
        low, high = resampled(columns, statistic, samples).confidence_interval
    return {"mean": mean, "low": float(low), "high": float(high), "n": len(columns[0])}


def calibration(preferences: np.ndarray, bins: int = 8, samples: int = 1000) -> dict:
    """Reliability of sigmoid(score difference) as the probability that the preferred side won.

    Bins hold equal numbers of pairs, by confidence in [0.5, 1]. `ece`: expected calibration error,
    the mean over pairs of |confidence - accuracy| of their bin (Naeini et al. 2015). Fewer pairs
    than bins have one bin each. Chance alone
    makes it positive, in each resample once more, so a percentile interval would lie too high: this
    one reaches as far below the estimate as the upper percentile lies above it, and down to 0 where
    an honest model could show as much.

    `ece_if_honest`: what a perfectly calibrated model of these confidences shows on so many pairs,
    in the mean, and what it stays under 95 % of the time.
    """
    bins = min(bins, len(preferences))
    confidence, correct = expit(np.abs(preferences)), wins(preferences)
    rows = [
        {"confidence": float(confidence[index].mean()), **share(correct[index])}
        for index in np.array_split(np.argsort(confidence, kind="stable"), bins)
    ]
    draws = np.random.default_rng(0).random((samples, len(confidence))) < confidence
    honest = _ece(np.broadcast_to(preferences, draws.shape), bins, draws)
    chance = {"mean": float(honest.mean()), "high": float(np.quantile(honest, LEVEL))}
    ece = _interval([preferences], lambda p, axis=-1: _ece(p, bins), samples)
    ece["high"] = max(ece["high"], ece["mean"])
    lowest = 2 * ece["mean"] - ece["high"]
    ece["low"] = 0.0 if ece["mean"] <= chance["high"] else max(lowest, 0.0)
    return {"bins": rows, "ece": ece, "ece_if_honest": chance}


def fit_temperature(preferences: np.ndarray) -> float:
    """T in [1/50, 50] that makes the labels likeliest under sigmoid(difference / T).

    Above 1 the model was too sure of itself. Guo et al. 2017, arXiv:1706.04599.
    """

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -preferences / np.exp(log_temperature)).mean())

    limit = np.log(50)
    return float(np.exp(optimize.fminbound(loss, -limit, limit)))


def recalibrate(
    validation: np.ndarray, test: np.ndarray, bins: int = 8, samples: int = 1000
) -> dict:
    """A temperature fitted on the validation pairs, and what it does to the test pairs' ECE.

    `temperature` has an interval over validation pairs; `ece_change` (after less before) over test
    pairs, with this temperature held fixed. `after`: `calibration` of the divided differences.
    """

    def change(before: np.ndarray, after: np.ndarray, axis: int = -1) -> np.ndarray:
        return _ece(after, bins) - _ece(before, bins)

    bins = min(bins, len(test))
    temperature = _interval([validation], fit_temperature, min(samples, 300))
    divided = test / temperature["mean"]
    return {
        "temperature": temperature,
        "ece_change": _interval([test, divided], change, samples),
        "after": calibration(divided, bins, samples),
    }


def seed_disagreement(preferences: Sequence[np.ndarray], samples: int = 2000) -> dict:
    """How far reward models that differ in their seed alone disagree on the same pairs.

    `preferences`: score differences, one array per seed, on one scale. `opposite`: share of pairs
    that two of the models rank in opposite ways; `spread`: standard deviation over seeds; `size`:
    |mean over seeds|, to see the spread against; `rank_correlation`: Spearman's, of two models;
    `accuracy`: where all seeds agree and where they do not.
    Raises ValueError for fewer than two seeds. Spread as a warning: arXiv:2310.02743.
    """
    if len(preferences) < 2:
        raise ValueError("disagreement needs the preferences of at least two seeds")
    scores, couples = np.array(preferences), list(combinations(range(len(preferences)), 2))
    signs, ranks = np.sign(scores), np.corrcoef(stats.rankdata(scores, axis=1))
    names = np.where(np.ptp(signs, axis=0) == 0, "seeds agree", "seeds disagree").tolist()
    return {
        "seeds": len(scores),
        "opposite": bootstrap(np.mean([signs[a] != signs[b] for a, b in couples], 0), samples),
        "spread": bootstrap(scores.std(axis=0, ddof=1), samples),
        "size": bootstrap(np.abs(scores.mean(axis=0)), samples),
        "rank_correlation": float(ranks[np.triu_indices(len(scores), 1)].mean()),
        "accuracy": by_group(np.mean([wins(p) for p in preferences], axis=0), names),
    }


def refuses(text: str) -> bool:
    return any(word in text.lower() for word in REFUSAL)


def categorise_error(pair: Pair, preference: float, typical: float, truth: Truth | None) -> str:
    """The pattern of a wrongly ranked pair, by the first rule that fits.

    label against gold: the gold reward prefers the other reply too (bundled world); near tie: the
    score difference is under a fifth of the typical one; safety: just one side refuses; length-led:
    the preferred reply is at least 1.5 times as long; confidently wrong: over twice the typical
    difference; other: none of these.
    """
    chosen, rejected = pair.chosen_text, pair.rejected_text
    if truth and gold_preferences([pair])[0] < 0:
        return "label against gold"
    if abs(preference) < 0.2 * typical:
        return "near tie"
    if refuses(chosen) != refuses(rejected):
        return "safety"
    if len(rejected) >= 1.5 * len(chosen):
        return "length-led"
    if abs(preference) > 2 * typical:
        return "confidently wrong"
    return "other"


def errors(pairs: Sequence[Pair], preferences: np.ndarray, truth: Truth | None) -> list[dict]:
    """Every wrongly ranked pair, most confident first: its index, score difference and category."""
    typical = float(np.median(np.abs(preferences)))
    found = []
    for index in np.argsort(preferences).tolist():
        preference = float(preferences[index])
        if preference < 0:
            category = categorise_error(pairs[index], preference, typical, truth)
            found.append({"pair": index, "preference": preference, "category": category})
    return found


def category(pair: Pair, truth: Truth | None) -> str:
    """The kind of its request where it is known; else the pair's subset, or the number of turns."""
    if truth:
        return truth.kind(pair.prompt_text)
    human = turns(pair.prompt_text)
    return pair.subset or {1: "one turn", 2: "two turns"}.get(human, "three turns or more")
