"""The verdict of a study, by rules from its results: nothing is said that no interval shows.

First what was found, then which method for which need, by the measured `needs`: that may end in
"the data do not say". A method that the study did not measure is not spoken of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import stdev
from typing import NamedTuple

from rlhf_lib import catalogue
from rlhf_lib.measure.statistics import POWER, UNCLEAR, direction, interval, listed
from rlhf_lib.profiles import load_profile
from rlhf_lib.settings import as_dict

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ASKED = {  # need -> how it reads, its unit, and digits
    "reward": ("Highest {deciding} reward", "gain over SFT", 2),
    "per_flop": ("Most {deciding} reward for its computing", "gain a {flop}", 3),
    "per_minute": ("Most {deciding} reward per minute, on this machine", "gain a minute", 2),
    "kl": ("Least KL to SFT", "nats a reply", 1),
    "forgetting": ("Least forgetting", "nats a token more than SFT on held-out text", 3),
}
MARK = "†"  # of a candidate that was not shown to raise the deciding reward


def sentences(results: Mapping) -> list[str]:
    """The verdict, one finding a sentence, the most important first."""
    parts = [_gains(results), _null(results), _ranking(results), _against_baseline(results)]
    parts += [*choices(results), _detectable(results), _overoptimisation(results)]
    parts += [beside_best_of_n(results), _reward_model(results), _repeats(results)]
    parts += [_tuning(results), _over(results), _families(results)]
    return [part for part in parts if part]


def headline(results: Mapping) -> list[str]:
    """The verdict in short: who gained, who leads, what went wrong, how sure all of it is."""
    parts = [_gains(results), _null(results), _ranking(results), _overoptimisation(results)]
    return [part for part in (*parts, beside_best_of_n(results), _over(results)) if part]


def lessons(results: Mapping) -> list[str]:
    """Who gained, who leads, what went wrong."""
    parts = _gains(results), _ranking(results), _overoptimisation(results)
    return [part for part in parts if part]


def sureness(results: Mapping) -> list[str]:
    """An alarm, where there is one, and what intervals are over."""
    return [part for part in (_null(results), _over(results)) if part]


def _measured(results: Mapping, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in results["policies"]]


def _methods(results: Mapping) -> list[str]:
    return _measured(results, catalogue.methods())


def _names(names: Iterable[str], last: str = "and") -> str:
    return listed([catalogue.label(name) for name in names], last)


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def asked(results: Mapping) -> str:
    """Who answered what, how often, and what was measured of it."""
    config, deciding = results["settings"]["evaluation"], results["deciding"]
    prompts, each = results["data"]["prompts"]["evaluation"]["count"], config["samples_per_prompt"]
    judges = {
        "gold": "the gold reward",
        "judge": "a reward model that was trained on pairs the proxy never saw",
        "proxy": "the proxy reward: no gold reward is known here, and there is no other judge",
    }
    again = _names(_measured(results, catalogue.policies("null")))
    luck = f"; {again} has random numbers of its own" if again else ""
    few = "KL" if deciding == "proxy" else "proxy, KL"
    many = f"each of {len(results['seeds'])} seeds, demonstrations for the first alone"
    seeds = many if len(results["seeds"]) > 1 else "one seed"
    return (
        f"{len(results['policies']) - 1} policies answered {prompts} prompts "
        f"({results['policies']['sft'][deciding]['units']} different requests) {each} times each, "
        f"SFT {max(each, config['baseline_samples'])} times, for {seeds}; with the same random "
        "numbers: the k-th reply "
        f"of one policy to a prompt has the luck of the k-th reply of another{luck}. {deciding} "
        f"reward is measured of all replies; {few} and entropy of the first "
        f"{min(config['measured_samples'], each)} to each of the first "
        f"{min(config['measured_prompts'], prompts)} prompts. SFT stands at other values in other "
        f"chapters, which ask other prompts, and fewer. Wins are judged by {judges[deciding]}; a "
        "tie is half a win."
    )


# ------------------------------------------------------------------------------ what was found


def _gains(results: Mapping) -> str:
    """Which methods changed the deciding reward against SFT."""
    deciding, methods = results["deciding"], _methods(results)
    gains = {name: results["policies"][name][f"{deciding}_gain"] for name in methods}
    said = []
    for word, did in (("higher", "raised"), ("lower", "lowered"), (UNCLEAR, "")):
        names = [name for name in methods if gains[name]["verdict"] == word]
        if names:
            change = f"{did} {deciding} reward over SFT"
            if not did:
                change = f"{_are(names)} {word} from SFT in {deciding} reward"
            numbers = "; ".join(f"{catalogue.label(n)} {interval(gains[n])}" for n in names)
            said.append(f"**{_names(names)} {change}** (differences: {numbers})")
    text = "; ".join(said) + "."
    unclear = [gain for gain in gains.values() if gain["verdict"] == UNCLEAR]
    if any(gain["low"] > 0 or gain["high"] < 0 for gain in unclear):
        text += (
            " An interval that leaves out 0 is not enough here: among so many comparisons, one in "
            "twenty does so by chance, and Holm's correction takes that off."
        )
    if deciding == "judge":
        text += (
            " The judge is a reward model trained on pairs that the proxy never saw: it shares the "
            "proxy's kind of error, not its very errors."
        )
        if right := results["reward_model"].get("judge_accuracy"):
            right = interval(right, 1, percent=True)
            text += f" It ranks {right} of held-out pairs as labelled."
    if deciding == "proxy":
        rewarded = [name for name in methods if catalogue.record(name).rewarded]
        were = "were" if len(rewarded) > 1 else "was"
        text += (
            f" The proxy is the very reward model that {_names(rewarded)} {were} trained against: "
            "a higher score shows that they optimise it, not that their replies are better."
        )
    return text


def _null(results: Mapping) -> str:
    """An alarm where SFT was found to differ from itself."""
    gain = f"{results['deciding']}_gain"
    for name in _measured(results, catalogue.policies("null")):
        found = results["policies"][name][gain]
        if found["verdict"] != UNCLEAR:
            return (
                f"**A warning:** {catalogue.label(name)}, which is SFT with other random numbers, "
                f"came out {found['verdict']} than SFT ({interval(found)}). Chance does that in "
                "one study of twenty. It may be this one, or gains are not measured right."
            )
    return ""


def _ranking(results: Mapping) -> str:
    """What the paired comparisons between the methods allow to say."""
    pairs = {key: r for key, r in results["comparisons"].items() if not _with_baseline(key)}
    clear = []
    for key, record in pairs.items():
        one, other = (catalogue.label(name) for name in key.split("_minus_"))
        if record["verdict"] == "lower":
            one, other = other, one
            record = {"mean": -record["mean"], "low": -record["high"], "high": -record["low"]}
        if pairs[key]["verdict"] != UNCLEAR:
            clear.append(f"{one} above {other} (difference {interval(record)})")
    if not pairs:
        return ""
    if not clear:
        count = len(_methods(results))
        number = COUNTS[count] if count < len(COUNTS) else str(count)
        one = len(results["seeds"]) == 1
        enough = "on this many prompts, one trained model each" if one else "at this many seeds"
        return f"Among themselves the {number} methods are not distinguishable {enough}."
    rest = " Other pairs are not distinguishable." if len(clear) < len(pairs) else ""
    return "Among the methods: " + "; ".join(clear) + "." + rest


def _with_baseline(key: str) -> bool:
    return key.endswith(f"_minus_{catalogue.baseline()}")


def _against_baseline(results: Mapping) -> str:
    """Does any method beat imitating the best of n samples, which takes no policy gradient?"""
    said = [
        f"{catalogue.label(key.split('_minus_')[0])} {record['verdict']} ({interval(record)})"
        for key, record in results["comparisons"].items()
        if _with_baseline(key)
    ]
    if not said:
        return ""
    baseline = catalogue.label(catalogue.baseline())
    return f"Against {baseline}, which imitates the best of its samples: {'; '.join(said)}."


def _detectable(results: Mapping) -> str:
    """What the study was able to see: without this line "not distinguishable" says little."""
    sizes = [record["detectable"] for record in results["comparisons"].values()]
    known = [size for size in sizes if size is not None]
    if not known:  # one seed and one prompt
        return ""
    smallest, largest = f"{min(known):.2f}", f"{max(known):.2f}"
    size = smallest if smallest == largest else f"{smallest} to {largest}, by comparison,"
    between, studies, besides = "two methods", "studies like this one", ""
    if len(results["seeds"]) == 1:
        between, studies = "two of these trained models", "sets of as many prompts"
        besides = " How other training runs would differ is not in it."
    return (
        f"What could be seen: a true difference of {size} in {results['deciding']} reward between "
        f"{between} is one that {POWER:.0%} of {studies} would find (before the correction for "
        f"the number of comparisons).{besides}"
    )


def _overoptimisation(results: Mapping) -> str:
    record, deciding = results["overoptimisation"], results["deciding"]
    if record is None or deciding == "proxy":
        return ""
    proxy, truly = record["proxy"], record[deciding]
    numbers = f"proxy {interval(proxy)}, {deciding} {interval(truly)}"
    if proxy["over"] == "prompts" and len(results["seeds"]) > 1:
        numbers += "; one seed, intervals over prompts"
    settings = results["settings"]["ppo"]
    low, default = settings["low_kl_coef"], settings["kl_coef"]
    if proxy["verdict"] == "higher" and truly["verdict"] == "lower":
        return (
            f"**More proxy reward, worse replies:** PPO at a KL coefficient of {low:g} instead of "
            f"{default:g} ends higher in proxy and lower in {deciding} (differences: {numbers})."
        )
    return (
        "Over-optimisation is not shown: against the default, the under-regularised PPO run is "
        f"{proxy['verdict']} in proxy and {truly['verdict']} in {deciding} ({numbers})."
    )


def beside_best_of_n(results: Mapping) -> str:
    """The baseline that needs no training: where its deciding reward peaks."""
    deciding, peak = results["deciding"], results["best_of_n_peak"]
    text = f"Best-of-n, which trains nothing, is best at n = {peak['n']} on half the requests; on "
    text += f"the others it has {deciding} reward {interval(peak[deciding])} (all that follows is "
    text += "measured there"
    if deciding != "proxy" and peak["n"] < peak["last"]:
        fall, n = peak["last_minus_peak"], peak["last"]
        word = f"{UNCLEAR} from that" if fall["verdict"] == UNCLEAR else fall["verdict"]
        text += f"; n = {n} is {word}, difference {interval(fall)}"
    text += ")"
    found = peak["methods"]
    for word, where in (("higher", "above"), ("lower", "below"), (UNCLEAR, UNCLEAR + " from")):
        names = [name for name in found if found[name]["verdict"] == word]
        numbers = "; ".join(f"{catalogue.label(n)} {interval(found[n])}" for n in names)
        if names:
            text += f"; {_names(names)} {_are(names)} {where} it (differences: {numbers})"
    return text + "."


def _reward_model(results: Mapping) -> str:
    accuracy = results["reward_model"]["accuracy"]
    words = {"higher": "above", "lower": "below", UNCLEAR: "not distinguishable from"}
    where = words[direction(accuracy["reward_model_minus_bag_of_words"])]
    text = f"The reward model ranks {interval(accuracy['reward_model'], 1, percent=True)} of "
    text += "held-out pairs as labelled, "
    text += f"{where} a bag of words ({interval(accuracy['bag_of_words'], 1, percent=True)})"
    ceiling = results["reward_model"].get("ceiling")
    return text + (f"; {ceiling:.1%} is reachable." if ceiling else ".")


def _repeats(results: Mapping) -> str:
    """What doing it all again may move: the spread between seeds, where there are several."""
    if len(results["seeds"]) == 1:
        return (
            "Another run, the same seed on another machine included, draws other samples; how far "
            "that moves a gain is not shown by a single seed."
        )
    key = f"{results['deciding']}_gain"
    gains = [results["policies"][name][key]["per_seed"] for name in _methods(results)]
    spreads = sorted(stdev(per_seed) for per_seed in gains)
    return (
        f"From seed to seed a method's gain moves by {spreads[0]:.2f} to {spreads[-1]:.2f} "
        "(standard deviation). So it may where a run is repeated on another machine: other "
        "rounding, and other samples after it."
    )


def _tuning(results: Mapping) -> str:
    """Where coefficients and learning rates come from, and what was other there."""
    keys = [k.split(".") for name in catalogue.tuned() for k in catalogue.record(name).tuned]
    tuned, settings = load_profile("laptop"), results["settings"]
    known = as_dict(tuned)
    other = [  # a setting that an earlier version had not is None
        f"`{section}.{key}`"
        for section, key in keys
        if settings[section].get(key) != known[section][key]
    ]
    if len(other) == len(keys):
        return (
            "Coefficients and learning rates are the profile's or your own; "
            "`python -m rlhf_lib tune` searches for each method's best on given data. Other values "
            "may rank the methods otherwise."
        )
    text = (
        "Coefficients and learning rates are, for each method, the best of "
        f"{tuned.tuning.trials} pairs of values that `python -m rlhf_lib tune` tried in the "
        "bundled world for the profile `laptop` (figures/tuning), by gold reward on validation "
        "prompts, one seed each"
    )
    text += f"; {listed(other)} {_are(other)} other here." if other else "."
    if unknown := [n for n in _measured(results, catalogue.candidates()) if not _searched(n)]:
        text += f" No search was made for {_names(unknown)}."
    used = tuned.data.source, tuned.model.name, tuned.name
    if (here := (results["source"], results["model"], results["profile"])) != used:
        text += f" This study: {', '.join(here)}; that one: {', '.join(used)}."
    return f"{text} Other values may rank the methods otherwise."


def _searched(name: str) -> bool:
    return bool(catalogue.record(name).tuned)


def _over(results: Mapping) -> str:
    """What the intervals are over."""
    over = "seeds and evaluation prompts"
    if len(results["seeds"]) == 1:
        over = "evaluation prompts, from a single seed: what is said of a method is said of the "
        over += "one model that it trained"
    return (
        f"Intervals are 95 % over {over}; of accuracies, over pairs; of forgetting, over held-out "
        "texts."
    )


def _families(results: Mapping) -> str:
    """What was corrected for the number of comparisons, and what was not."""
    baseline = catalogue.label(catalogue.baseline())
    alone = [
        "policies that are no candidates", "SFT against itself", "the ends of best-of-n's curve",
        "the reward model against the bag of words and along its learning curve",
    ]  # fmt: skip
    if results["overoptimisation"] is not None and results["deciding"] != "proxy":
        alone.append("over-optimisation")
    if results["requests"] is not None:
        alone.append("gains by kind of request")
    return (
        "Families were fixed in advance: each candidate against SFT; the methods among "
        f"themselves; each method against {baseline}; each method against best-of-n; in each "
        f"need, the candidates among themselves and against {baseline}; and the policies in each "
        "kind of failure, in forgetting and in second opinions. What is called a difference there "
        f"stays one after Holm's correction within its family. Uncorrected are {listed(alone)}. "
        "Rankings belong to this data, this model size and this tuning."
    )


# ------------------------------------------------------------------- which method for which need


class Leaders(NamedTuple):
    """The best by its mean, those not distinguishable from it, and those clearly behind."""

    best: str
    tied: list[str]
    behind: list[str]


def leaders(need: Mapping, among: Sequence[str]) -> Leaders:
    """Who leads in one need among the given candidates, at least one."""
    sign = 1 if need["better"] == "higher" else -1
    best = max(among, key=lambda name: sign * need["policies"][name]["mean"])
    others = [name for name in among if name != best]
    behind = [name for name in others if _beats(need, best, name)]
    return Leaders(best, [name for name in others if name not in behind], behind)


def _beats(need: Mapping, one: str, other: str) -> bool:
    """Does the corrected comparison call `one` better than `other`?"""
    pairs, wanted = need["comparisons"], need["better"]
    if f"{one}_minus_{other}" in pairs:
        return pairs[f"{one}_minus_{other}"]["verdict"] == wanted
    opposite = {"higher": "lower", "lower": "higher"}[wanted]
    return pairs[f"{other}_minus_{one}"]["verdict"] == opposite


def choices(results: Mapping) -> list[str]:
    """One sentence a need that was measured: who leads among all candidates, and by how much."""
    needs, deciding = results["needs"], results["deciding"]
    if not needs:
        return []
    candidates, gain = _measured(results, catalogue.candidates()), f"{deciding}_gain"
    able = [n for n in candidates if results["policies"][n][gain]["verdict"] == "higher"]
    if not able:
        return [
            f"**Which method for which need? The data do not say:** {_names(candidates)} were not "
            f"shown to raise {deciding} reward over SFT. Until one is, nothing here speaks for "
            "paying more than SFT costs."
        ]
    said = []
    for key, (title, unit, digits) in ASKED.items():
        if key in needs:
            unit = unit.format(flop=results["flop"])
            found = _who(needs[key], candidates, able, unit, digits)
            said.append(f"**{title.format(deciding=deciding)}:** {found}")
    said.append(_without_rl(needs["reward"], candidates, able, deciding))
    if len(able) < len(candidates):
        said.append(f"{MARK} was not shown to raise {deciding} reward over SFT.")
    if deciding == "proxy":
        said.append(
            "No judge but the training reward was measured: these choices say who optimises it "
            "best, not whose replies are best."
        )
    if len(results["seeds"]) == 1:
        said.append("One seed: the choices are between these trained models, not between methods.")
    return said


def _who(need: Mapping, among: Sequence[str], able: Sequence[str], unit: str, digits: int) -> str:
    """Who leads among some candidates, at least one; those not `able` are marked.

    Where more is better, one whose own interval includes 0 leads nobody.
    """
    records, found = need["policies"], leaders(need, among)

    def numbers(names: Iterable[str], unit: str = "") -> str:
        known = [(n, "" if n in able else MARK, interval(records[n], digits)) for n in names]
        return listed([f"{catalogue.label(n)}{mark} ({value}{unit})" for n, mark, value in known])

    best = numbers([found.best], f" {unit}")
    behind = f"; clearly behind: {numbers(found.behind)}." if found.behind else "."
    if need["better"] == "higher" and records[found.best]["low"] <= 0:
        return f"nobody is shown to lead: {numbers(among, f' {unit}')}."
    if found.tied:
        text = f"the data do not say: {best} is {UNCLEAR} from {numbers(found.tied)}"
        return text + behind
    return f"{best}, clearly ahead of {numbers(found.behind)}." if found.behind else f"{best}."


def _without_rl(need: Mapping, candidates: list[str], able: list[str], deciding: str) -> str:
    """The best that needs no reinforcement learning, and whether RL adds to it."""
    title, unit, digits = "**No reinforcement learning:**", *ASKED["reward"][1:]
    without = [name for name in candidates if not catalogue.record(name).samples]
    plain = [name for name in able if name in without]
    if not without:
        return ""
    if not plain:
        said = "was not" if len(without) == 1 else "were not"
        return f"{title} {_names(without)} {said} shown to raise {deciding} reward."
    text = f"{title} {_who(need, plain, able, unit, digits)}"
    with_rl = [name for name in able if name not in without]
    if not with_rl:
        return f"{text} No method with it was shown to raise the reward."
    one, other = leaders(need, with_rl).best, leaders(need, plain).best
    if _beats(need, other, one):
        one, other = other, one
    word = "clearly above" if _beats(need, one, other) else f"{UNCLEAR} from"
    return f"{text} {catalogue.label(one)} is {word} {catalogue.label(other)}."
