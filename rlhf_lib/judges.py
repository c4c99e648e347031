"""Who can tell the preferred reply: the reward model, simple baselines, and the reachable ceiling.

A judge gives each pair a number: positive when it prefers the chosen reply, 0 for a tie, which is
half a win.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, diags_array
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf_lib.data import Pair
from rlhf_lib.intervals import bootstrap
from rlhf_lib.world import ANNOTATOR, CONTROL, gold_reward, parse_request, preference_probability

REFUSAL = ("sorry", "cannot", "can't", "won't", "unable", "not able", "not comfortable")


def wins(preferences: np.ndarray) -> np.ndarray:
    """1 where the chosen reply is preferred, 0.5 for a tie, 0 where it is not."""
    return (preferences > 0) + 0.5 * (preferences == 0)


def length_preferences(pairs: Sequence[Pair]) -> np.ndarray:
    """Prefers the longer reply (characters)."""
    return np.array([float(len(p.chosen_text) - len(p.rejected_text)) for p in pairs])


def bag_of_words_preferences(train: Sequence[Pair], test: Sequence[Pair]) -> np.ndarray:
    """TF-IDF of words and word pairs, logistic regression on the difference of the two replies."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([text for p in train for text in (p.chosen_text, p.rejected_text)])

    def differences(pairs: Sequence[Pair]) -> csr_matrix:
        chosen = vectorizer.transform([p.chosen_text for p in pairs])
        return csr_matrix(chosen - vectorizer.transform([p.rejected_text for p in pairs]))

    # every other pair is turned round, so that there are two classes to tell apart
    signs = np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    model.fit(diags_array(signs) @ differences(train), signs)
    return model.decision_function(differences(test))


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


def ceiling(pairs: Sequence[Pair], control: bool = False) -> float:
    """Bayes accuracy: how often the best possible judge agrees with the noisy labels."""
    annotator = CONTROL if control else ANNOTATOR
    probability = np.array([
        preference_probability(p.prompt_text, p.chosen_text, p.rejected_text, annotator)
        for p in pairs
    ])  # fmt: skip
    return float(np.maximum(probability, 1 - probability).mean())


def accuracies(
    train: Sequence[Pair],
    test: Sequence[Pair],
    reward_preferences: Sequence[np.ndarray],
    source: str,
    samples: int = 2000,
) -> dict[str, dict]:
    """Accuracy of each judge on the test pairs, with a bootstrap interval over pairs.

    `reward_preferences`: the reward model's, one array per seed; its wins are averaged over seeds.
    """
    judges = {
        "reward_model": np.mean([wins(p) for p in reward_preferences], axis=0),
        "bag_of_words": wins(bag_of_words_preferences(train, test)),
        "longer_wins": wins(length_preferences(test)),
        "learned_length": wins(learned_length_preferences(train, test)),
    }
    if source.startswith("bundled"):
        judges["gold"] = wins(gold_preferences(test))
    table = {name: bootstrap(values, samples) for name, values in judges.items()}
    table["reward_model"]["per_seed"] = [float(wins(p).mean()) for p in reward_preferences]
    difference = judges["reward_model"] - judges["bag_of_words"]
    table["reward_model_minus_bag_of_words"] = bootstrap(difference, samples)
    return table


def calibration(preferences: np.ndarray, bins: int = 8) -> dict:
    """Reliability of sigmoid(score difference) as the probability that the preferred side won.

    Bins hold equal numbers of pairs, by confidence in [0.5, 1]. `ece`: expected calibration error,
    the mean over pairs of |confidence - accuracy| of their bin (Naeini et al. 2015).
    """
    confidence, correct = expit(np.abs(preferences)), wins(preferences)
    rows = []
    for index in np.array_split(np.argsort(confidence), bins):
        rows.append({
            "confidence": float(confidence[index].mean()),
            **{k: v for k, v in bootstrap(correct[index], 1000).items() if k != "over"},
        })  # fmt: skip
    ece = sum(abs(r["confidence"] - r["mean"]) * r["n"] for r in rows) / len(preferences)
    return {"bins": rows, "ece": float(ece)}


def refuses(text: str) -> bool:
    return any(word in text.lower() for word in REFUSAL)


def categorise_error(pair: Pair, preference: float, typical: float, bundled: bool) -> str:
    """The pattern of a wrongly ranked pair, by the first rule that fits.

    label against gold: the gold reward prefers the other reply too (bundled world); near tie: the
    score difference is under a fifth of the typical one; safety: just one side refuses; length-led:
    the preferred reply is at least 1.5 times as long; confidently wrong: over twice the typical
    difference; other: none of these.
    """
    chosen, rejected = pair.chosen_text, pair.rejected_text
    if bundled and gold_preferences([pair])[0] < 0:
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


def errors(pairs: Sequence[Pair], preferences: np.ndarray, source: str) -> list[dict]:
    """Every wrongly ranked pair, most confident first: its index, score difference and category."""
    bundled = source.startswith("bundled")
    typical = float(np.median(np.abs(preferences)))
    wrong = [int(i) for i in np.argsort(preferences) if preferences[i] < 0]
    return [
        {
            "pair": i,
            "preference": float(preferences[i]),
            "category": categorise_error(pairs[i], float(preferences[i]), typical, bundled),
        }
        for i in wrong
    ]


def request_kind(prompt_text: str, source: str) -> str:
    """The kind of a bundled prompt (help, harm, edge, truth); "all" for real data."""
    return parse_request(prompt_text).kind if source.startswith("bundled") else "all"
