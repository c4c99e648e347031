"""The comparison with peers: its protocol, its statistics, its table."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from benchmarks import compare, ratios, text
from benchmarks.protocol import Worker, WorkerError
from tools import readme

# A worker whose "library" prints to stdout while it loads and computes.
FAKE = """
import os, sys, time
from benchmarks.protocol import serve
from rlhf_lib.session.work import Work
log = open(sys.argv[1], "a", buffering=1)
def load():
    print("loading")
    os.system("echo from a child process")
    def run(number):
        if number == int(sys.argv[3]):
            raise ValueError("this round is broken")
        print("noise")
        log.write(f"{sys.argv[2]} {number}\\n")
        return Work(10 + number, 100, 1e6)
    return run
serve(load)
"""


def fake(tmp_path: Path, name: str, broken: int = -1) -> list[str]:
    return [sys.executable, "-c", FAKE, str(tmp_path / "log"), name, str(broken)]


def test_both_workers_answer_in_turn_and_the_warm_up_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers find the package wherever the driver was started
    commands = {name: fake(tmp_path, name) for name in ("library", "peer")}
    lines: list[str] = []
    found = compare.run_rounds(commands, 2, 2, lines.append)
    order = (tmp_path / "log").read_text().split("\n")[:-1]
    once = [f"{name} {n}" for n in range(compare.WARM_UP + 2) for name in ("library", "peer")]
    assert order == 2 * once
    for side in found.values():
        kept = [10 + compare.WARM_UP, 11 + compare.WARM_UP]
        assert [record["items"] for record in side] == 2 * kept
        assert [record["process"] for record in side] == [0, 0, 1, 1]
        assert all(record["seconds"] > 0 for record in side)
        assert all(0.01 < record["peak_memory_gb"] < 100 for record in side)
    assert sum("warm-up" in line for line in lines) == 2 * 2 * compare.WARM_UP


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    root = {"PYTHONPATH": str(compare.ROOT)}
    with Worker(fake(tmp_path, "library", broken=1), root) as worker:
        worker.ask(0)
        with pytest.raises(WorkerError, match="this round is broken"):
            worker.ask(1)


def test_leaving_ends_the_process(tmp_path: Path) -> None:
    with Worker(fake(tmp_path, "library"), {"PYTHONPATH": str(compare.ROOT)}) as worker:
        assert worker.ask(0)["items"] == 10
    assert worker._process.poll() == 0


def test_a_ratio_is_a_geometric_mean_with_its_t_interval() -> None:
    ours, theirs = [6.0, 8.0, 12.0], [2.0, 2.0, 2.0]
    found = ratios.ratio(ours, theirs, [0, 1, 2])
    logs = [math.log(3), math.log(4), math.log(6)]
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(72 ** (1 / 3))
    assert found["median"] == pytest.approx(4)
    assert math.log(found["low"]) == pytest.approx(expected.low)
    assert math.log(found["high"]) == pytest.approx(expected.high)


def test_a_ratio_and_its_inverse_are_judged_alike() -> None:
    ours, theirs = [3.0, 5.0, 4.0], [1.0, 2.0, 2.5]
    one, other = ratios.ratio(ours, theirs, [0, 1, 2]), ratios.ratio(theirs, ours, [0, 1, 2])
    assert one["mean"] * other["mean"] == pytest.approx(1)
    assert one["low"] * other["high"] == pytest.approx(1)


def test_what_slows_both_sides_of_a_round_leaves_the_ratio_alone() -> None:
    steady = ratios.ratio([6.0, 6.6, 6.0], [2.0, 2.0, 2.2], [0, 1, 2])
    disturbed = ratios.ratio([6.0, 3.3, 6.0], [2.0, 1.0, 2.2], [0, 1, 2])
    assert disturbed == pytest.approx(steady)


def test_rounds_of_one_process_are_one_measurement() -> None:
    """Each process has luck of its own, which its rounds share: more of them prove nothing."""
    few = ratios.ratio([2.0, 3.0], [1.0, 1.0], [0, 1])
    many = ratios.ratio([2.0] * 9 + [3.0] * 9, [1.0] * 18, [0] * 9 + [1] * 9)
    assert {key: many[key] for key in ("mean", "low", "high")} == pytest.approx(
        {key: few[key] for key in ("mean", "low", "high")}
    )
    with pytest.raises(ValueError, match="run two at least"):
        ratios.ratio([1.0, 2.0], [1.0, 1.0], [0, 0])


def test_both_sides_set_their_process_up_alike() -> None:
    """The allocator alone is worth up to a quarter of a step."""
    for side in ("library_worker", "peer_worker"):
        source = (compare.ROOT / "benchmarks" / f"{side}.py").read_text()
        assert "set_up_process(wanted.threads)" in source.partition("__main__")[2], side


def rounds(rate: float, memory: float, flops: float) -> list[dict]:
    return [
        {
            "seconds": s,
            "items": rate * s,
            "tokens": 50 * rate * s,
            "flops": flops * s,
            "peak_memory_gb": memory,
            "process": process,
        }
        for process, s in enumerate((1.0, 2.0, 4.0))
    ]


def test_a_side_is_summarised_by_its_rates() -> None:
    found = ratios.summarise(rounds(3.0, 2.0, 30.0), roof=120.0)
    assert found["items_per_second"] == pytest.approx({"median": 3, "min": 3, "max": 3})
    assert found["tokens_per_second"]["median"] == pytest.approx(150)
    assert found["roof_share"]["median"] == pytest.approx(0.25)
    assert found["tokens_per_item"] == pytest.approx(50)


def made_up(gpu: str | None = None) -> dict:
    """Results in which DPO reaches its target, SFT misses, and GRPO's interval holds it."""
    stages = {}
    speed = {"dpo": (14.0, 2.0), "sft": (5.0, 2.0), "grpo": (6.2, 2.0), "ppo_plain": (5.0, 2.0)}
    for stage, (ours, theirs) in speed.items():
        record = ratios.compare(
            rounds(ours, 3.0, 60.0 if stage == "dpo" else 40.0),
            rounds(theirs, 2.0 if stage == "sft" else 4.0, 10.0),
            100.0,
        )
        stages[stage] = {"peer_name": "TRL", **record}
    stages["grpo"]["ratio"] |= {"low": 2.7, "high": 3.5}
    return {
        "environment": {"gpu": gpu, "cpu_cores": 2, "threads": 2},
        "peer_packages": {"trl": "1.16.0", "transformers": "5.0"},
        "settings": {
            "precision": "bf16",
            "rounds": 3,
            "processes": 3,
            "pairs": 32,
            "batch_size": 8,
            "samples": 32,
            "samples_per_step": 16,
            "max_new_tokens": 32,
            "mean_tokens": {"prompt": 86.0, "chosen": 40.0, "rejected": 51.0},
        },
        "roof": {"flops_per_second": 9.5e11},
        "stages": stages,
    }


def test_the_table_says_reached_only_where_the_interval_does() -> None:
    table = text.benchmark_table(made_up()).set_index("stage")
    assert table["target"].to_dict() == {
        "dpo": "≥ 6: reached",
        "sft": "≥ 3: missed",
        "grpo": "≥ 3: undecided",
        "ppo plain": "–",
    }
    assert table.loc["dpo", "ratio"] == "7.0"
    assert table.loc["grpo", "ratio"] == "3.1 [2.7, 3.5]"
    assert table.loc["dpo", "of the roof"] == "60%"


def test_a_gpu_has_its_own_targets() -> None:
    table = text.benchmark_table(made_up("a GPU")).set_index("stage")
    assert table.loc["sft", "target"] == "≥ 2: reached"
    results = made_up()
    results["environment"]["cpu"] = "a processor, AMX"
    table = text.benchmark_table(results).set_index("stage")
    assert table.loc["sft", "target"] == "≥ 4: missed"
    assert "Target, 30% of the roof" in text.benchmark_summary(results)


def test_roof_and_memory_targets_are_judged_too() -> None:
    said = text.benchmark_summary(made_up())
    assert "roof in training steps: reached for dpo; missed for sft." in said
    assert "memory than the peer: reached for dpo, grpo, ppo plain; missed for sft." in said
    assert "as fast: 10.0 in dpo, 10.0 in sft, 10.0 in grpo." in said
    assert "950 GFLOP/s" in said
    assert "3 pairs of processes with 3 rounds each after a warm-up" in said
    results = made_up()
    results["settings"]["rounds"] = 1
    assert "with one round each" in text.benchmark_summary(results)


def test_growth_has_a_table_of_its_own() -> None:
    grown = {"axes": {"reply_tokens": {"values": [8, 128], "seconds": [1.0, 4.0], "slope": 0.5}}}
    assert "| reply tokens | 8 | 128 | 1.00 | 4.00 | 0.50 |" in text.summary(grown)


def test_a_benchmark_block_is_filled_and_a_study_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "cpu.json").write_text(json.dumps(made_up()))
    text = "<!-- benchmark: cpu -->\nold\n<!-- end -->\nkept <!-- end -->"
    filled = readme.fill(text, tmp_path / "figures")
    assert "old" not in filled
    assert filled.endswith("<!-- end -->\nkept <!-- end -->")
    assert "| dpo | TRL |" in filled
    assert readme.fill(filled, tmp_path / "figures") == filled


def test_what_nobody_has_measured_is_said(tmp_path: Path) -> None:
    text = readme.fill("<!-- benchmark: gpu -->\n<!-- end -->", tmp_path / "figures")
    assert "Not measured yet: there is no `gpu.json`" in text


def test_the_roof_is_the_best_of_the_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import roof

    config = SimpleNamespace(hidden_size=4, intermediate_size=None, vocab_size=11)
    monkeypatch.setattr(roof, "matmul_rate", lambda shape, *_: float(sum(shape)))
    found = roof.measure(config, "fp32")
    assert found["flops_per_second"] == 6144
    assert {"2048 x 4 x 16", "1024 x 4 x 11"} <= set(found["shapes"])


def test_a_matrix_product_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import roof

    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    # a spell lasts one tick; two products a tick make half a second each, so two fill one second
    assert roof.matmul_rate((2, 3, 5), "fp32", seconds=1.0) == 2 * 2 * 3 * 5 * 2


def test_each_stage_is_kept_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {side: rounds(rate, 1.0, 1e9) for side, rate in (("library", 20.0), ("peer", 10.0))}

    def run_rounds(commands: dict, rounds: int, processes: int, say: object) -> dict:
        if commands["library"][-1] == "dpo":
            raise RuntimeError("cut off")
        return sides

    monkeypatch.setattr(compare, "run_rounds", run_rounds)
    monkeypatch.setattr(compare.roof, "measure", lambda *_: {"flops_per_second": 1e12})
    monkeypatch.setattr(compare.AutoConfig, "from_pretrained", lambda name: None)
    monkeypatch.setattr(compare, "peer_packages", lambda python: {})
    monkeypatch.setattr(compare, "settings", lambda job, count: {})
    job = SimpleNamespace(write=lambda path: None, model="", precision="fp32")
    kept: list[dict] = []
    with pytest.raises(RuntimeError, match="cut off"):
        compare.benchmark(
            job,  # type: ignore[arg-type]
            tmp_path,
            ("sft", "dpo"),
            2,
            2,
            sys.executable,
            lambda line: None,
            lambda results: kept.append(json.loads(json.dumps(results))),
        )
    assert [list(results["stages"]) for results in kept] == [["sft"]]
    assert kept[0]["stages"]["sft"]["ratio"]["mean"] == pytest.approx(2.0)
