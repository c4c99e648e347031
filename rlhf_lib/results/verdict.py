"""The verdict of a study, by rules from its results: nothing is said that no interval shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_lib.measure.statistics import POWER, interval, listed
from rlhf_lib.measure.statistics import verdict as direction
from rlhf_lib.results import choices
from rlhf_lib.results.choices import NAMES
from rlhf_lib.results.policies import BASELINE, METHODS


def sentences(results: Mapping) -> list[str]:
    """The verdict, one finding a sentence, the most important first."""
    parts = [_gains(results), _ranking(results), _against_baseline(results)]
    parts += [*choices.sentences(results), _detectable(results)]
    parts += [_overoptimisation(results), _best_of_n(results)]
    parts += [_reward_model(results), _scope(results)]
    return [part for part in parts if part]


def headline(results: Mapping) -> list[str]:
    """The verdict in short, for the first page: who gained, who leads, what went wrong."""
    parts = [_gains(results), _ranking(results), _overoptimisation(results), _best_of_n(results)]
    return [part for part in (*parts, _scope(results)) if part]


def _names(names: Sequence[str]) -> str:
    return listed([NAMES[name] for name in names])


def _gains(results: Mapping) -> str:
    """Which methods changed the judged reward against SFT."""
    judge = results["judge"]
    gains = {name: results["policies"][name][f"{judge}_gain"] for name in METHODS}
    said = []
    for verdict, verb in (("higher", "raised"), ("lower", "lowered")):
        names = [name for name in METHODS if gains[name]["verdict"] == verdict]
        if names:
            numbers = "; ".join(f"{NAMES[n]} {interval(gains[n])}" for n in names)
            said.append(f"**{_names(names)} {verb} {judge} reward over SFT** ({numbers})")
    unclear = [name for name in METHODS if gains[name]["verdict"] == "not distinguishable"]
    if unclear:
        numbers = "; ".join(f"{NAMES[n]} {interval(gains[n])}" for n in unclear)
        verb = "are" if len(unclear) > 1 else "is"
        said.append(f"**{_names(unclear)} {verb} not distinguishable from SFT** ({numbers})")
    text = "; ".join(said) + "."
    if any(gains[name]["low"] > 0 or gains[name]["high"] < 0 for name in unclear):
        text += (
            " An interval that leaves out 0 is not enough here: among so many comparisons, one in "
            "twenty does so by chance, and Holm's correction takes that off."
        )
    if judge == "judge":
        text += (
            " The judge is a reward model trained on pairs that the proxy never saw: it shares the "
            "proxy's kind of error, not its very errors."
        )
    if judge == "proxy":
        text += (
            " The proxy is the very reward model that PPO and GRPO were trained against: a higher "
            "score shows that they optimise it, not that their replies are better."
        )
    return text


def _ranking(results: Mapping) -> str:
    """What the paired comparisons between the methods allow to say."""
    pairs = {k: r for k, r in results["comparisons"].items() if not k.endswith(BASELINE)}
    clear = []
    for key, record in pairs.items():
        one, other = key.split("_minus_")
        if record["verdict"] == "lower":
            one, other = other, one
            low, high = -record["high"], -record["low"]
            record = record | {"mean": -record["mean"], "low": low, "high": high}
        if record["verdict"] != "not distinguishable":
            clear.append(f"{NAMES[one]} above {NAMES[other]} (difference {interval(record)})")
    if not clear:
        return "Among themselves the three methods are not distinguishable at this number of seeds."
    rest = len(clear) < len(pairs)
    text = "Among the methods: " + "; ".join(clear) + "."
    return text + (" Other pairs are not distinguishable." if rest else "")


def _against_baseline(results: Mapping) -> str:
    """Does any method beat imitating the best of n samples, which takes no policy gradient?"""
    records = {m: results["comparisons"].get(f"{m}_minus_{BASELINE}") for m in METHODS}
    said = [f"{NAMES[m]} {r['verdict']} ({interval(r)})" for m, r in records.items() if r]
    if not said:  # a study from before there was this baseline
        return ""
    return f"Against {NAMES[BASELINE]}, which imitates the best of its samples: {'; '.join(said)}."


def _detectable(results: Mapping) -> str:
    """What the study was able to see: without this line "not distinguishable" says little."""
    sizes = [record.get("detectable") for record in results["comparisons"].values()]
    known = [size for size in sizes if size is not None]
    if not known:  # a study from before it was measured
        return ""
    smallest, largest = f"{min(known):.2f}", f"{max(known):.2f}"
    size = smallest if smallest == largest else f"{smallest} to {largest}, by comparison,"
    return (
        f"What could be seen: a true difference of {size} in {results['judge']} reward between two "
        f"methods is one that {POWER:.0%} of studies like this one would find (before the "
        "correction for the number of comparisons)."
    )


def _overoptimisation(results: Mapping) -> str:
    record, judge = results["overoptimisation"], results["judge"]
    if record is None or judge == "proxy":
        return ""
    proxy, gold = record["proxy"], record[judge]
    numbers = f"proxy {interval(proxy)}, {judge} {interval(gold)}"
    settings = results["settings"]["ppo"]
    low, default = settings["low_kl_coef"], settings["kl_coef"]
    if proxy["verdict"] == "higher" and gold["verdict"] == "lower":
        return (
            f"**More proxy reward, worse replies:** PPO at a KL coefficient of {low:g} instead of "
            f"{default:g} ends higher in proxy and lower in {judge} (differences: {numbers})."
        )
    return (
        "Over-optimisation is not shown: against the default, the under-regularised PPO run is "
        f"{proxy['verdict']} in proxy and {gold['verdict']} in {judge} ({numbers})."
    )


def _best_of_n(results: Mapping) -> str:
    """The baseline that needs no training: where its judged reward peaks."""
    judge, curve = results["judge"], results["best_of_n"]["default"]
    best = max(curve, key=lambda row: row[judge]["mean"])
    text = f"Best-of-n, which trains nothing, peaks at n = {best['n']} with {judge} reward "
    text += f"{interval(best[judge])}"
    if judge != "proxy" and best["n"] < curve[-1]["n"]:
        last, n = curve[-1][judge], curve[-1]["n"]
        if last["high"] is not None and last["high"] < best[judge]["low"]:
            text += f" and falls to {interval(last)} at n = {n}"
        else:
            text += f" ({interval(last)} at n = {n}, not clearly less)"
    peak = best[judge]["mean"] if best[judge]["high"] is None else best[judge]["high"]
    ahead = [n for n in METHODS if results["policies"][n][judge]["low"] > peak]
    if not ahead:
        return text + "; no method is clearly above that peak."
    return text + f"; {_names(ahead)} {'are' if len(ahead) > 1 else 'is'} clearly above that peak."


def _reward_model(results: Mapping) -> str:
    accuracy = results["reward_model"]["accuracy"]
    difference = accuracy["reward_model_minus_bag_of_words"]
    where = {
        "higher": "above", "lower": "below", "not distinguishable": "not distinguishable from",
    }[direction(difference)]  # fmt: skip
    text = f"The reward model ranks {interval(accuracy['reward_model'], 1, percent=True)} of "
    text += "held-out pairs as labelled, "
    text += f"{where} a bag of words ({interval(accuracy['bag_of_words'], 1, percent=True)})"
    ceiling = results["reward_model"].get("ceiling")
    return text + (f"; {ceiling:.1%} is reachable." if ceiling else ".")


def _scope(results: Mapping) -> str:
    seeds = len(results["seeds"])
    over = "seeds" if seeds > 1 else "evaluation prompts, from a single seed"
    corrected = ""
    if any("p_adjusted" in record for record in results["comparisons"].values()):
        over = "seeds and evaluation prompts" if seeds > 1 else over
        corrected = (
            " What is called a difference stays one after Holm's correction within its table."
        )
    return (
        f"Intervals are 95 % over {over}; of accuracies, over pairs.{corrected} Rankings belong to "
        "this data, this model size and this tuning."
    )
