"""The work that is counted, the workers that do it, and what is predicted from both."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks import growth, library_worker, predict, prepare, text
from benchmarks.job import STAGES, Job, Row, read_job
from benchmarks.peer_worker import load as load_peer
from rlhf_lib import catalogue
from rlhf_lib.flops import sizes_of
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.session.work import PASSES, Sizes, count
from rlhf_lib.settings import SettingsError

has_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


def matmul_flops(counter: FlopCounterMode) -> int:
    """Products with weights; attention's own are batched ones."""
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_torch_counts(causal_model: PreTrainedModel, backward: bool) -> None:
    model = causal_model
    ids = torch.randint(3, 32, (3, 10))
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, 6:])
        if backward:
            logits.sum().backward()
    passes = "sft" if backward else "generation"  # three passes, or one
    work = count(passes, Sizes(*sizes_of(model)), 3, 3 * 6, 3 * 4)
    # all ten positions meet the trunk, the four reply positions the output layer
    assert matmul_flops(counter) == work.flops
    assert work.tokens == 30


def test_embeddings_and_biases_are_no_work(make_model: Callable) -> None:
    sizes = Sizes(
        *sizes_of(make_model("gpt2"))
    )  # 2 layers of width 16: attention 4 w², feed-forward 8 w²
    assert sizes == Sizes(2 * 12 * 16 * 16, 16 * 32)


def test_epochs_add_what_is_trained_alone() -> None:
    sizes = Sizes(1000, 100)
    once, twice = (count("ppo", sizes, 1, 5, 5, epochs).flops for epochs in (1, 2))
    # policy and value model: forward and backward through the trunk; the policy's output layer too
    assert twice - once == 2 * (6 * 1000 * 10 + 3 * 100 * 5)


def test_every_stage_has_its_count() -> None:
    assert {stage.removesuffix("_plain") for stage in STAGES} <= set(PASSES)


@pytest.fixture
def tiny_job(tmp_path: Path, make_model: Callable, tiny_tokenizer: Any) -> Job:
    """Two steps of everything with a model of 32 words."""
    words = [3, 4, 5, 6, 7, 8]
    rows = [Row(words[: 2 + i % 4], words[: 1 + i % 3], [*words[1:3], 1]) for i in range(8)]
    torch.manual_seed(2)
    job = prepare.job_of(tmp_path, make_model("gpt2"), tiny_tokenizer, rows, 8, "fp32")
    small = {
        "batch_size": 4,
        "samples": 8,
        "samples_per_step": 4,
        "group_size": 2,
        "max_new_tokens": 3,
        "generation_batch": 4,
        "ppo_minibatch": 2,
    }
    return replace(job, **small)


def test_a_job_comes_back_as_it_was_written(tiny_job: Job, tmp_path: Path) -> None:
    tiny_job.write(tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == tiny_job


@pytest.mark.parametrize(("pairs", "kept"), [(8, [2]), (16, [1, 3]), (40, [0, 1, 2, 3, 4])])
def test_a_round_has_batches_of_one_length_from_all_lengths(pairs: int, kept: list[int]) -> None:
    lengths = [5 * (place % 40) + 3 for place in range(40)]
    rows = [Row([3] * 2, [4] * (n - 2), [5] * (7 * n % 200)) for n in lengths]
    job = Job("", "", "fp32", 1, Sizes(1, 1), rows[::3] + rows[1::3] + rows[2::3], [], pairs)
    found = [[row.longest("sft") for row in batch] for batch in job.batches("sft")]
    sorted_lengths = sorted(lengths, reverse=True)
    assert found == [sorted_lengths[8 * place : 8 * place + 8] for place in kept]
    longest = [max(len(r.chosen), len(r.rejected)) for b in job.batches("dpo") for r in b]
    assert longest == sorted(longest, reverse=True)  # the prompts are of one length
    assert job.pair_work("sft").items == pairs
    short = replace(job, rows=rows[:19], pairs=30)  # both sides train whole batches alone
    assert [len(batch) for batch in short.batches("sft")] == [8, 8]
    assert short.pair_work("sft").items == 16
    with pytest.raises(ValueError, match="3 rows do not fill a batch of 8"):
        replace(job, rows=rows[:3]).batches("sft")
    assert sorted(job.order(3, 5)) == [0, 1, 2, 3, 4]
    assert job.order(3, 5) == job.order(3, 5) != job.order(4, 5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_library_worker_computes_a_round(stage: str, tiny_job: Job) -> None:
    run = library_worker.load(stage, tiny_job)
    check_round(stage.removesuffix("_plain"), tiny_job, run)


@pytest.mark.parametrize("stage", ["generation", "ppo", "dpo_plain", "grpo_plain"])
def test_bare_torch_and_transformers_need_no_trl(stage: str, tiny_job: Job) -> None:
    check_round(stage.removesuffix("_plain"), tiny_job, load_peer(stage, tiny_job))


def check_round(stage: str, job: Job, run: Callable) -> None:
    prompts = [len(row.prompt) for row in job.rows]
    for number in (0, 1):
        work = run(number)
        if stage in ("sft", "reward_model", "dpo"):
            assert work == job.pair_work(stage)
            assert work.items == 8
        else:
            asked = {"generation": 4, "ppo": 8, "grpo": 4}[stage]
            assert work.items == {"generation": 4, "ppo": 8, "grpo": 8}[stage]
            prompt_tokens = sum(prompts[i] for i in job.prompts_of_round(number, asked))
            assert work.items <= work.tokens - prompt_tokens <= 3 * work.items


@has_trl
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "grpo"])
def test_trl_computes_the_same_rows(stage: str, tiny_job: Job) -> None:
    check_round(stage, tiny_job, load_peer(stage, tiny_job))


def test_drawn_rows_have_the_lengths_of_real_ones() -> None:
    rows = prepare.drawn_rows(load_tokenizer("tiny"), 500)
    lengths = torch.tensor([[len(r.prompt), len(r.chosen), len(r.rejected)] for r in rows])
    assert int(lengths.max()) <= 128
    assert int(lengths.min()) >= 4
    means = lengths.float().mean(0).tolist()
    assert 75 < means[0] <= 100
    assert all(38 < mean < 48 for mean in means[1:])
    assert all(row.chosen[-1] == load_tokenizer("tiny").eos_token_id for row in rows)


def test_a_model_too_short_for_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="positions and the rows need 256"):
        prepare.make_job(tmp_path, "tiny", "", 8)


def test_growth_of_known_cost() -> None:
    assert growth.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert growth.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_every_axis_of_growth_changes_itself_alone(tmp_path: Path) -> None:
    for axis, cases in growth.AXES.items():
        plain = [{k: v for k, v in vars(case).items() if k != axis} for case in cases]
        assert all(case == plain[0] for case in plain)
    seconds = growth.time_case(growth.Case(pairs=8, batch_size=4, vocabulary=512), repeats=1)
    assert seconds > 0
    figure = growth.draw(
        {"axes": {"pairs": {"values": [8, 16], "seconds": [1.0, 2.0], "slope": 1.0}}}
    )
    assert "slope 1.00" in figure.axes[0].get_title()


MEASURED = {
    "environment": {"gpu": None, "cpu_cores": 2, "threads": 2},
    "settings": {"mean_tokens": {"prompt": 100.0, "chosen": 40.0, "rejected": 60.0}},
    "stages": {stage: {"library": {"flops_per_second": {"median": 1e11}}} for stage in STAGES},
}


def test_a_prediction_is_counted_work_over_a_measured_rate() -> None:
    found = predict.predict(MEASURED, "full")
    rows = {row["stage"]: row for row in found["stages"]}
    profile, sizes = load_profile("full"), predict.gpt2_sizes()
    pairs = profile.data.train_pairs * profile.dpo.epochs
    # policy forward and backward, reference forward; GPT-2's 85 M weights and 38.6 M of its output
    assert sizes.trunk == 12 * 12 * 768 * 768
    flops = 8 * (sizes.trunk * 200 + sizes.head * 100) * pairs
    assert rows["dpo"]["flops"] == pytest.approx(flops)
    assert rows["dpo"]["hours"] == pytest.approx(flops / 1e11 / 3600)
    assert found["hours"] == pytest.approx(sum(row["hours"] for row in found["stages"]))


@pytest.mark.parametrize("name", PROFILES)
def test_every_stage_of_a_profile_is_predicted(name: str) -> None:
    profile = load_profile(name)
    lengths = predict.Lengths(100.0, 40.0)
    found = predict.parts(profile, predict.gpt2_sizes(), lengths)
    stages = {record.name for record in catalogue.stages(profile)}
    assert {part.name.partition(":")[0] for part in found} == stages - {"dataset"}
    assert min(part.work.flops for part in found) > 0


def test_no_rate_is_invented() -> None:
    measured = copy.deepcopy(MEASURED)
    del measured["stages"]["ppo"]
    found = predict.predict(measured, "full")
    assert found["hours"] is None
    said = text.prediction_summary(found)
    assert said.count("not measured") == 4  # PPO at three KL coefficients, and the sum
    assert "The FLOPs hold for any device" in said


def test_a_gpu_is_named() -> None:
    measured = {**MEASURED, "environment": {"gpu": "made-up GPU"}}
    said = text.prediction_summary(predict.predict(measured, "full"))
    assert "made-up GPU" in said
    assert "No GPU was measured" not in said
