"""What chapters 04 and 05 show of training, on made-up numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from rlhf_lib.show import training

NAN = float("nan")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replies of two tokens and of one; the second row is padded on both sides."""
    ids = torch.tensor([[5, 6, 7, 2], [0, 6, 2, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    return ids, attention, attention[:, -2:]


TEXTS = {0: "<pad>", 2: "<eos>", 5: "\n\nHuman: ", 6: "Why?\n\nAssistant:", 7: " Yes"}


class Tokenizer:
    def decode(self, ids: torch.Tensor) -> str:
        return "".join(TEXTS[i] for i in ids.tolist())


def words(ids: list[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def test_replies_stand_beside_their_numbers(batch: Any) -> None:
    tokenizer: Any = Tokenizer()
    frame = training.replies(batch, tokenizer, {"gold": torch.tensor([0.5, -1.0])}, update=3)
    assert list(frame) == ["update", "request", "reply", "gold"]
    assert list(frame["gold"]) == ["0.50", "-1.00"]
    assert frame["request"][0] == "Why?"
    assert frame["reply"].tolist() == ["Yes<eos>", "<eos>"], "padding belongs to no reply"


def test_a_reply_is_shown_token_by_token(batch: Any) -> None:
    values = torch.tensor([[-0.001, 0.253], [0.3, NAN]])
    frame = training.tokens(batch, 0, words, {"value": values}, update=2)
    assert list(frame) == ["update", "token", "value"]
    assert list(frame["token"]) == words(batch[0][0, -2:].tolist())
    assert list(frame["value"]) == ["0.00", "0.25"], "no minus before a zero"
    assert list(training.tokens(batch, 1, words, {"value": values})["value"]) == ["0.30"]


def test_moves_are_those_of_real_tokens(batch: Any) -> None:
    change = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    frame = training.moves(batch[2], torch.tensor([[0.5], [-0.5]]), change)
    assert frame["advantage"].tolist() == [0.5, 0.5, -0.5]
    assert frame["change"].tolist() == [1.0, 2.0, 3.0]


def test_the_pull_is_told_of_each_update() -> None:
    along = pd.DataFrame({"advantage": [0.0, 1.0, 2.0], "change": [0.0, 1.0, 2.0]})
    against = along.assign(change=-along["change"])
    assert "is 1.00 and -1.00 in the 2 updates" in training.pulled([along, against])


def test_the_clip_is_watched_and_left_as_it_was() -> None:
    def gain(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> str:
        return "gain"

    lib: Any = SimpleNamespace(clipped_gain=gain)
    old = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 0.0]])  # the last is padding
    new = old + torch.tensor([[0.0, 0.1, 0.5, -0.5, 0.0]])
    with training.watched(lib) as shares:
        assert lib.clipped_gain(new, old, old, 0.2) == "gain"
        assert lib.clipped_gain(old, old, old, 0.2) == "gain"
    assert shares == [0.5, 0.0]
    assert lib.clipped_gain is gain
    with pytest.raises(TypeError), training.watched(lib):
        lib.clipped_gain(new)
    assert lib.clipped_gain is gain, "an error leaves nothing behind"


def test_variance_between_groups() -> None:
    assert training.between(torch.tensor([1.0, -1.0, 2.0, -2.0]), 2) == 0
    assert training.between(torch.tensor([1.0, 1.0, -1.0, -1.0]), 2) == 1
    assert training.between(torch.tensor([2.0, 0.0, 0.0, -2.0]), 2) == pytest.approx(0.5)
    assert training.between(torch.zeros(4), 2) == 0
    rounded = torch.tensor([1.0, -1.0 + 1e-7, 2.0, -2.0])
    assert training.between(rounded, 2) == 0, "only rounding lies between these"


def test_estimators_are_summed_over_replies_without_padding() -> None:
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    frame = training.estimators({"k1": torch.tensor([[1.0, 2.0], [-1.0, 50.0]])}, mask)
    (row,) = frame.to_dict("records")
    assert row["nats a reply"].startswith("1.00 [")
    assert row["spread over replies"] == "2.83"
    assert row["replies below 0"] == "50%"


def test_gradients_have_a_column_a_word() -> None:
    frame = training.gradients({"KL": torch.tensor([0.5, -0.25])})
    assert frame.to_dict("records") == [
        {"what is differentiated": "KL", "word 1": "+0.500", "word 2": "-0.250"}
    ]


def test_directions_are_measured_against_the_first() -> None:
    both = {"default": torch.tensor([2.0, 0.0]), "other": torch.tensor([0.0, -1.0])}
    frame = training.directions(both.items())
    assert frame["cosine with the default"].tolist() == ["1.000", "0.000"]
    assert frame["length, default = 1"].tolist() == ["1.00", "0.50"]


@pytest.mark.parametrize(("cut", "moral"), [(2.0, "pay not to stop"), (0.0, "nobody promised")])
def test_unfinished_replies(cut: float, moral: str) -> None:
    said = training.unfinished(torch.ones(4), torch.full((4,), cut), 1.5)
    assert moral in said
    assert f"score 1.00 on average, and {cut:.2f} without" in said
    assert said.endswith("The penalty is 1.5.")


def run(reward: float, gold: float | None) -> list[dict[str, float]]:
    known = {} if gold is None else {"gold": gold}
    jitter = [0.0, 0.02] * 6
    return [{k: v + j for k, v in ({"reward": reward} | known).items()} for j in jitter]


@pytest.mark.parametrize(
    ("reward", "gold", "finding"),
    [
        (2.0, -1.0, "over-optimisation"),
        (2.0, 3.0, "too high"),
        (0.5, -1.0, "without even pleasing"),
        (2.0, 1.0, "not distinguishable"),
        (2.0, None, "nobody knows"),
    ],
)
def test_a_longer_leash_is_judged_by_gold(reward: float, gold: float | None, finding: str) -> None:
    names = {"reward": "proxy"} | ({} if gold is None else {"gold": "gold reward"})
    base = run(1.0, None if gold is None else 1.0)
    said = training.loosened(base, run(reward, gold), names, (0.2, 0.01))
    assert len(said) == len(names) + 1
    assert said[0].startswith("proxy, last quarter: 1.01 at β = 0.2, ")
    assert finding in said[-1]


def test_the_first_updates_of_two_runs() -> None:
    keys = ("kl_coef", "kl", "reward", "loss/value_avg", "val/explained_variance")
    rows = [{"step": i, "peak_memory_gb": 1.0} | dict.fromkeys(keys, 0.5) for i in range(3)]
    frame = training.first_updates({"default": rows, "shared": rows[:2]})
    assert frame["run"].tolist() == ["default"] * 2 + ["shared"] * 2
    assert frame["update"].tolist() == [0, 1, 0, 1]
    assert frame["β"][0] == "0.500"


@pytest.mark.parametrize(
    ("share", "moral"), [(0.0, "every prompt still"), (0.05, "nearly"), (0.5, "bought nothing")]
)
def test_silent_groups(share: float, moral: str) -> None:
    said = training.silence([{"frac_reward_zero_std": s} for s in (0.9, 0.9, 0.9, share)])
    assert said.startswith(f"{share:.0%} of the groups")
    assert moral in said


def test_a_group_is_shown_best_first() -> None:
    frame = pd.DataFrame({"reply": ["a", "b", "c", "other group"]})
    best = training.group(frame, torch.tensor([-1.0, 1.0, 0.0, 9.0]), 3)
    assert best["reply"].tolist() == ["b", "c", "a"]
    assert best["advantage"].tolist() == ["+1.00", "+0.00", "-1.00"]


def test_variety_counts_distinct_replies_to_each_prompt() -> None:
    def said(*replies: list[int]) -> Any:
        return SimpleNamespace(prompts=[[7], [7], [8]], responses=list(replies))

    assert training.variety(said([1], [2], [1]), said([3], [3], [3])) == (
        "Of 3 replies, 2 are distinct now; 3 were before."
    )


# ------------------------------------------------------------------------------ runs side by side


def log(first: float, steps: int = 8, **also: float) -> list[dict]:
    return [
        {"step": i, "reply_tokens": 1000 * (i + 1), "reward": first + i, "kl": 0.1 * i} | also
        for i in range(steps)
    ]


def test_the_courses_share_their_axes_and_each_seed_has_a_line() -> None:
    figure = training.courses({"ppo": [log(0.0), log(5.0)], "dpo": [log(1.0, steps=4)]})
    assert len(figure.axes) == 4, "gold, entropy and length were not logged by all"
    ppo, dpo = figure.axes[0], figure.axes[1]
    assert len(ppo.lines) == 2
    assert len(dpo.lines) == 1
    assert ppo.get_ylim() == dpo.get_ylim()
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    thousands = [1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0]
    assert ppo.lines[0].get_xdata().tolist() == thousands
    assert ppo.get_title() == "PPO"


def test_a_metric_that_one_run_lacks_has_no_row() -> None:
    known = {"ppo": [log(0.0, gold=1.0)], "dpo": [log(0.0, gold=2.0)]}
    assert len(training.courses(known).axes) == 6
    assert len(training.courses(known | {"grpo": [log(0.0)]}).axes) == 6  # three policies, no gold


def test_where_a_run_was_best_is_dotted_in_tokens() -> None:
    runs = {"ppo": [log(0.0, gold=1.0)], "ppo_low_kl": [log(0.0, gold=2.0)]}
    proxy, loose, gold, other = training.courses(runs, training.REWARDS, {"ppo_low_kl": 4}).axes
    assert [len(axis.lines) for axis in (proxy, loose, gold, other)] == [1, 2, 1, 2]
    assert other.lines[1].get_xdata()[0] == 15.0  # thousand tokens after five steps
    assert proxy.get_ylim() != gold.get_ylim(), "no two units on one axis"


def test_probes_now_and_then_stand_where_all_tokens_count() -> None:
    run = log(0.0, steps=4)
    for row in (run[1], run[2]):
        del row["reward"]
    (line,) = training.courses({"dpo": [run]}, {"reward": "reward"}).axes[0].lines
    assert line.get_xdata().tolist() == [1.0, 10.0]
    del run[2]["reply_tokens"]
    with pytest.raises(ValueError, match="train the stage again"):
        training.courses({"dpo": [run]}, {"reward": "reward"})


def test_what_a_taste_leads_to_has_rows_of_its_own() -> None:
    runs = {"ppo": [log(0.0, **{"signs/polite": 2.0, "signs/refused": 0.5})]}
    figure = training.courses(runs, training.SIGNS)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylabel() == "polite words\na reply"
    assert training.stability(runs, training.SIGNS)["polite words a reply"].tolist() == ["2.00"]


def test_the_spread_is_that_between_seeds() -> None:
    frame = training.stability({"ppo": [log(0.0), log(4.0)], "dpo": [log(1.0)]}).set_index("policy")
    assert frame.loc["PPO", "proxy reward"] == "8.50 ± 2.83"  # 6.5 and 10.5
    assert frame.loc["DPO", "proxy reward"] == "7.50"
    assert frame.loc["PPO", "seeds"] == "2"
