"""The exercises: a blank is no failure, the folded solutions are right, and mistakes get a hint.

Solutions and scaffolds are taken from the notebooks as they are stored, and run on made-up data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from rlhf_lib.course import answers, exercises
from rlhf_lib.proofs import plain
from rlhf_lib.show import widgets

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHAPTERS = sorted({name[:2] for name in answers.CHECKS})

# for each exercise a mistake that one can really make
MISTAKES = {
    "01-1": "reply = ' I think that Assistant: is a marker.'",
    "01-2": "def cut(p, r, max_p, max_r, eos): return p[:max_p], [*r, eos][:max_r]",
    "01-3": "def probability(g, p, w): return 1 / (1 + math.exp(-0.8 * g - 0.5 * p - 0.05 * w))",
    "01-5": "def read(chosen, rejected):\n"
    "    marker = '\\n\\nAssistant:'\n"
    "    prompt, reply = chosen.split(marker, 1)\n"
    "    return prompt + marker, reply.strip(), rejected.split(marker, 1)[1].strip()",
    "01-4": "share = sum(len(p.chosen_text) > len(p.rejected_text) for p in train) / len(train)",
    "02-1": "def difference(p): return p / (1 - p)",
    "02-2": "def last_scores(hidden, weight, lengths): return hidden[:, -1] @ weight",
    "02-3": "def ece(c, won, bins): return abs(c - won).mean()",
    "02-4": "surer_half = (preferences[np.argsort(-preferences)[:20]] > 0).mean()",
    "02-5": "from rlhf_lib.proofs import plain\n"
    "def my_step(model, optimizer, pairs):\n"
    "    (-plain.reward_margins(model, pairs).sigmoid()).mean().backward()\n"
    "    optimizer.step()",
    "03-1": "def combine(parts, tokens): return sum(parts) / len(parts)",
    "03-2": "def reply_logprobs(logits, prompt, reply):\n"
    "    return logits[len(prompt) :].log_softmax(-1)[range(len(reply)), reply]",
    "03-3": "def favourite(scores, finished): return int(scores.argmax())",
    "03-4": "from rlhf_lib.proofs import plain\n"
    "def my_step(model, optimizer, examples):\n"
    "    losses = [plain.sft_loss(model, [example]) for example in examples]\n"
    "    torch.stack(losses).mean().backward()\n"
    "    optimizer.step()",
    "04-1": "def my_gae(rewards, values, gamma, gae_lambda): return rewards",
    "04-2": "def returns(rewards): return [sum(rewards)] * len(rewards)",
    "04-3": "def silent(ratio, advantage, clip_range): return abs(ratio - 1) > clip_range",
    "04-4": "cost = metrics[0]['kl_coef'] * metrics[0]['kl']",
    "04-5": "from rlhf_lib.proofs import plain\n"
    "def my_step(model, optimizer, batch, old, advantages, clip_range):\n"
    "    ratio = (plain.logprobs(model, batch, 1.0) - old).exp()\n"
    "    ratio = ratio.clamp(1 - clip_range, 1 + clip_range)\n"
    "    (-(ratio * advantages * batch.mask).sum() / batch.mask.sum()).backward()\n"
    "    optimizer.step()",
    "05-1": "first = 11\ndef factor(G): return 1 - 1 / (G - 1)",
    "05-2": "def weight(lengths, i, aggregation): return 1 / sum(lengths)",
    "05-3": "def silent_share(rewards, G): return 1 - len(set(rewards)) / len(rewards)",
    "05-4": "from rlhf_lib.proofs import plain\n"
    "def my_step(model, optimizer, batch, old, earned, group_size, clip_range):\n"
    "    advantages = (earned - earned.mean()) / earned.std()\n"
    "    new = plain.logprobs(model, batch, 1.0)\n"
    "    gain = plain.clipped_gain(new, old, advantages[:, None], clip_range) * batch.mask\n"
    "    (-(gain.sum(1) / batch.mask.sum(1)).mean()).backward()\n"
    "    optimizer.step()",
    "06-1": "def pull(lead, beta): return 1 / (1 + math.exp(beta * lead))",
    "06-2": "def best_margin(smoothing): return math.log(smoothing)",
    "06-3": "beta_half = 0.1",
    "06-4": "def target(beta): return 1 / beta",
    "06-5": "from rlhf_lib.proofs import plain\n"
    "def my_step(model, optimizer, reference, pairs, beta):\n"
    "    for prompt, chosen, rejected in pairs:\n"
    "        sides = [plain.rises(model, reference, [prompt], [r]) for r in (chosen, rejected)]\n"
    "        lead = sides[0] / len(chosen) - sides[1] / len(rejected)\n"
    "        (-torch.nn.functional.logsigmoid(beta * lead).mean() / len(pairs)).backward()\n"
    "    optimizer.step()",
    "07-1": "def paired_error(a, b): return (a.var(ddof=1) / 50 + b.var(ddof=1) / 50) ** 0.5",
    "07-2": "def win_rate(a, b): return (a > b).mean()",
    "07-3": "def best_of_n_kl(n): return float(np.log(n))",
    "07-4": "def seed_interval(m):\n"
    "    half = 1.96 * np.std(m, ddof=1) / len(m) ** 0.5\n"
    "    return np.mean(m) - half, np.mean(m) + half",
    "07-5": "def differ(gains): return {name for name, g in gains.items() if g.mean() > 0.3}",
}


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def tagged(tag: str) -> dict[str, str]:
    """Exercise -> the source of its cell with this tag, in the order of the notebooks."""
    found = {}
    for chapter in CHAPTERS:
        (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
        cells = nbformat.read(path, as_version=4).cells
        sources = [cell.source for cell in cells if tag in tags(cell)]
        found |= {f"{chapter}-{place}": source for place, source in enumerate(sources, 1)}
    return found


SCAFFOLDS, SOLUTIONS = tagged("exercise"), tagged("solution")


@pytest.fixture
def given(tiny_data: Any, tiny_tokenizer: Any, make_model: Callable) -> dict[str, Any]:
    """What the notebooks have at hand when their exercises begin, made up."""
    metrics = [
        {
            "reward": 1.0,
            "kl": 2.0,
            "kl_coef": 0.1,
            "objective/scores": 1.0,
            "objective/non_score_reward": -0.2,
            "objective/rlhf_reward": 0.4,
        },
        {
            "reward": 2.0,
            "kl": 3.0,
            "kl_coef": 0.1,
            "objective/scores": 2.0,
            "objective/non_score_reward": -0.3,
            "objective/rlhf_reward": 1.6,
        },
    ]
    train = tiny_data.pairs["train"]
    ties = [replace(pair, rejected_text=pair.chosen_text) for pair in train[:3]]
    return {
        "train": train + ties,
        "tokenizer": tiny_tokenizer,
        "model": make_model("gpt2"),
        "metrics": metrics,
        "math": math,
        "plain": plain,
        "torch": torch,
        "np": np,
        "preferences": np.random.default_rng(1).normal(0.5, 1.0, size=41),
        "widgets": widgets,
        "check": exercises.check,
        "four_reference": [0.4, 0.3, 0.2, 0.1],
        "four_reward": [1.0, 0.0, -0.5, 2.0],
    }


def run(source: str, given: dict[str, Any]) -> dict[str, Any]:
    namespace = vars(ModuleType("notebook")) | given
    exec(source, namespace)
    return namespace


def verdict(answer: str, name: str, given: dict[str, Any], printed: Any) -> str:
    """What the check at the scaffold's end says of this answer."""
    call = SCAFFOLDS[name].splitlines()[-1]
    run(f"{answer}\n{call}", given)
    return printed.readouterr().out.strip()


def test_every_check_has_its_exercise_solution_and_mistake() -> None:
    assert list(SCAFFOLDS) == list(SOLUTIONS) == sorted(answers.CHECKS) == sorted(MISTAKES)
    assert all(3 <= sum(name.startswith(c) for name in SCAFFOLDS) <= 5 for c in CHAPTERS)
    for name, source in SCAFFOLDS.items():
        assert source.splitlines()[-1].startswith(f'check("{name}", ')


@pytest.mark.parametrize("name", answers.CHECKS)
def test_a_scaffold_is_not_answered_yet(name: str, given: dict, capsys: Any) -> None:
    run(SCAFFOLDS[name], given)
    assert capsys.readouterr().out.strip() == f"{name}: not answered yet"


@pytest.mark.parametrize("name", answers.CHECKS)
def test_the_folded_solution_is_right(name: str, given: dict, capsys: Any) -> None:
    text = SOLUTIONS[name]
    assert text.startswith("<details><summary>Solution</summary>\n\n")
    assert text.endswith("\n\n</details>")
    code = text.split("```python\n")[1].split("\n```")[0]
    assert verdict(code, name, given, capsys) == f"{name}: right"


@pytest.mark.parametrize("name", answers.CHECKS)
def test_a_mistake_gets_a_hint(name: str, given: dict, capsys: Any) -> None:
    said = verdict(MISTAKES[name], name, given, capsys)
    assert said.startswith(f"{name}: not yet. ")
    assert len(said) > 30


# of one exercise an answer, and what of its hint has to be said to just this answer
HINTS = (
    ("02-1", "def difference(p): math.log(p)", "does the function `return` what it found?"),
    ("03-2", MISTAKES["03-2"], "One place too late"),
    ("04-1", "{solution}\nold = my_gae\ndef my_gae(*a): return old(*a)[::-1]", "wrong way round"),
    ("04-1", "{solution}\nold = my_gae\ndef my_gae(r, v, *a): return np.add(old(r, v, *a), v)",
     "These are the returns"),
    ("05-1", "{solution}\nfirst = 10", "The factor is right. From which G on"),
    ("05-3", "def silent_share(rewards, G):\n"
     "    spreads = [np.std(rewards[i : i + G]) for i in range(0, len(rewards), G)]\n"
     "    return sum(s == 0 for s in spreads) / len(spreads)", "its spread is not zero"),
    ("06-3", "beta_half = 0", "β must be above 0"),
    ("06-3", "beta_half = -1.0", "β must be above 0"),
    ("02-5", "def my_step(model, optimizer, pairs): optimizer.step()", "have not moved"),
    ("07-5", "def differ(gains):\n    from scipy import stats\n"
     "    return {k for k, g in gains.items() if stats.ttest_1samp(g, 0).pvalue < 0.05}",
     "are a family"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "hint"), HINTS)
def test_a_hint_fits_the_answer(
    name: str, answer: str, hint: str, given: dict, capsys: Any
) -> None:
    solution = SOLUTIONS[name].split("```python\n")[1].split("\n```")[0]
    assert hint in verdict(answer.replace("{solution}", solution), name, given, capsys)
