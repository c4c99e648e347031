"""Families of models: this library's numbers are those of a model's own forward pass, or it says
why it does not read it.

Windows of 16 tokens are shorter than some rows here and longer than others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_lib.course import twins
from rlhf_lib.data.encoding import Demonstration, Pair
from rlhf_lib.models import agreement
from rlhf_lib.models.generation import draw_tokens, generate
from rlhf_lib.models.load import (
    add_value_head,
    load_policy,
    load_reward_model,
    load_tokenizer,
    load_value_model,
    save_model,
)
from rlhf_lib.models.logprobs import response_logprobs, sequence_scores, token_values
from rlhf_lib.models.packing import Reading, lay_out_for
from rlhf_lib.proofs import plain
from rlhf_lib.settings import SettingsError
from tools import families

REFUSED = ("Mamba", "LFM 2", "BERT")
UNSCORED = ("Granite", "Cohere", "CodeGen", "XGLM")  # transformers has no classifier for them
WORKS = [name for name in families.FAMILIES if name not in REFUSED]
SCORED = [name for name in WORKS if name not in UNSCORED]
UNPLACED = ("BLOOM", "MPT", "Falcon-RW")  # distances as a bias: nobody tells them positions
PROMPTS = [[60, 61, 62, 63, 64], [60, 61, 62, 63, 64], [70, 71, 72]]
SHORT = PROMPTS, [[80, 81, 82], [90, 91, 92, 93, 1], [100, 101]]
LONG = (
    [list(range(50, 62))] * 2 + [list(range(150, 170))],
    [list(range(70, 80)), [*range(90, 97), 1], list(range(110, 125))],
)
S = plain.Settings(batch_size=4, group_size=2, max_new_tokens=6)


class Saved(NamedTuple):
    """A family's model in a folder, as somebody else has saved it, and loaded by transformers."""

    family: str
    folder: Path
    own: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(family: str) -> Saved:
        if family not in made:
            folder = families.save(family, tmp_path_factory.mktemp("family"))
            own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            made[family] = Saved(family, folder, own, load_tokenizer(folder))
        return made[family]

    return get


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


@pytest.mark.parametrize("rows", [SHORT, LONG], ids=["short", "longer than a window"])
@pytest.mark.parametrize("family", WORKS)
def test_log_probs_are_the_models_own(
    family: str, rows: tuple[list[list[int]], list[list[int]]], saved: Callable[[str], Saved]
) -> None:
    given = saved(family)
    model = load_policy(given.folder)
    with torch.no_grad():
        found, mask = response_logprobs(model, *rows)
    for i, (prompt, response) in enumerate(zip(*rows, strict=True)):
        own = own_logprobs(given.own, prompt, response)
        torch.testing.assert_close(found[i][mask[i].bool()], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [SHORT, LONG], ids=["short", "longer than a window"])
@pytest.mark.parametrize("family", SCORED)
def test_scores_are_the_saved_models(
    family: str,
    rows: tuple[list[list[int]], list[list[int]]],
    saved: Callable[[str], Saved],
    tmp_path: Path,
) -> None:
    given = saved(family)
    model, tokenizer = load_reward_model(given.folder, given.tokenizer, seed=0)
    model.score.weight.data.mul_(100)
    with torch.no_grad():
        found = sequence_scores(model, *rows)
    save_model(model, tokenizer, tmp_path)
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        alone = [
            own.eval()(input_ids=torch.tensor([prompt + response])).logits[0, 0]
            for prompt, response in zip(*rows, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-4)
    # a value model's numbers at the last token are those of the reward model it begins as
    with torch.no_grad():
        whole = token_values(load_value_model(tmp_path), rows[0], [[*r, 5] for r in rows[1]])
    ends = whole[torch.arange(3), torch.tensor([len(r) for r in rows[1]])]
    torch.testing.assert_close(ends, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WORKS)
def test_samples_are_the_models_own(family: str, saved: Callable[[str], Saved]) -> None:
    """Some go past a window, some prompts are shorter than others."""
    given, prompts = saved(family), [LONG[0][0], PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    luck = torch.rand(4, 8, dtype=torch.float64, generator=torch.manual_seed(1))
    found = generate(load_policy(given.folder), given.tokenizer, prompts, 8, uniforms=luck)
    for prompt, response, own_luck in zip(prompts, found, luck, strict=True):
        drawn: list[int] = []
        while len(drawn) < 8 and families.EOS not in drawn:
            with torch.no_grad():
                logits = given.own(input_ids=torch.tensor([prompt + drawn])).logits[:, -1]
            drawn.append(int(draw_tokens(logits, own_luck[None, len(drawn)][:, None])))
        assert response == drawn


@pytest.mark.parametrize("method", ["sft", "reward_model", "ppo", "grpo", "dpo"])
@pytest.mark.parametrize("family", WORKS)
def test_one_update_of_every_method(
    family: str, method: str, saved: Callable[[str], Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends where one by the model's own forward pass does."""
    if method == "reward_model" and family in UNSCORED:
        pytest.skip("no sequence classifier")
    if family in UNPLACED:
        told = plain.inputs
        monkeypatch.setattr(
            plain, "inputs", lambda b: {k: v for k, v in told(b).items() if k != "position_ids"}
        )
    given = saved(family)
    policy, reference = load_policy(given.folder), load_policy(given.folder)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    rows = [[60 + i, *range(100, 103 + i)] for i in range(4)]
    if method == "sft":
        both = twins.sft(policy, [Demonstration("", "", [9, 8], row) for row in rows], S)
    elif method in ("reward_model", "dpo"):
        pairs = [Pair("", "", "", "", [7, 8, 9 + i // 2], r, [*r[::-1], 1]) for i, r in
                 enumerate(rows)]  # fmt: skip
        if method == "dpo":
            both = twins.dpo(policy, reference, pairs, S)
        else:
            both = twins.reward_model(_scorer(given), pairs, S)
    else:
        batch = plain.sample(policy, [PROMPTS[0]] * 2 + [PROMPTS[2]] * 2, families.EOS, S)
        earned = torch.tensor([1.0, -1.0, 0.5, 0.2])
        if method == "grpo":
            both = twins.grpo(policy, reference, batch, earned, S)
        else:
            value = load_policy(given.folder) if family in UNSCORED else _scorer(given)
            if family in UNSCORED:  # its own trunk with a head that reads values
                add_value_head(value)
            both = twins.ppo(policy, value, reference, batch, earned, S)
    assert both.moved > 0.01
    assert both.apart < 1e-3 * both.moved, both


def _scorer(given: Saved) -> PreTrainedModel:
    return load_reward_model(given.folder, given.tokenizer, seed=0)[0]


def test_rows_longer_than_a_window_stand_alone(saved: Callable[[str], Saved]) -> None:
    model = load_policy(saved("Mistral").folder)
    assert lay_out_for(model, *SHORT).visible is not None
    assert lay_out_for(model, *LONG).visible is None
    model.reading = Reading()  # as if it had no window
    with torch.no_grad():
        found, mask = response_logprobs(model, *LONG)
    own = own_logprobs(saved("Mistral").own, LONG[0][0], LONG[1][0])
    assert (found[0][mask[0].bool()] - own).abs().max() > 0.01, "the example shows nothing"


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(
    family: str, saved: Callable[[str], Saved]
) -> None:
    with pytest.raises(SettingsError, match=r"LMHeadModel|ForCausalLM"):
        load_policy(saved(family).folder)


@pytest.mark.parametrize("family", UNSCORED)
def test_no_sequence_classifier_is_one_sentence(family: str, saved: Callable[[str], Saved]) -> None:
    given = saved(family)
    with pytest.raises(SettingsError, match="has no sequence classifier") as error:
        load_reward_model(given.folder, given.tokenizer, seed=0)
    assert len(str(error.value)) < 300


def test_no_language_model_is_one_sentence(tmp_path: Path) -> None:
    families.make("Llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(SettingsError, match="no causal language model for T5Config"):
        load_policy(tmp_path)


def test_a_model_that_nothing_agrees_with_is_refused(
    saved: Callable[[str], Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = agreement._read
    monkeypatch.setattr(agreement, "_read", lambda *given: read(*given) + 0.1 * torch.rand(1))
    with pytest.raises(SettingsError, match="cannot be read by this library"):
        load_policy(saved("Llama").folder)


def test_a_model_that_cannot_sample_is_refused(
    saved: Callable[[str], Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = agreement.next_logits
    monkeypatch.setattr(agreement, "next_logits", lambda *given: step(*given).flip(-1))
    with pytest.raises(SettingsError, match="cannot sample with a cache"):
        load_policy(saved("Llama").folder)


def test_the_narrowest_of_positions_and_windows_counts() -> None:
    assert set(agreement.positions_of(GPT2Config(n_positions=64))) == {64}
    model = families.make("Mistral")
    assert agreement.widest_row(model) == 16
    model.config.sliding_window = None
    assert agreement.widest_row(model) == model.config.max_position_embeddings
    assert agreement.positions_of(BertConfig(max_position_embeddings=12)) == [12]


# -------------------------------------------------------------------------- tokenizers


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    families.save("Llama", tmp_path)
    tokenizer = families.byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="279 tokens and its embedding 272"):
        load_tokenizer(tmp_path)


def test_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    families.save("GPT-2", tmp_path)
    assert load_tokenizer(tmp_path).model_max_length == 1024
