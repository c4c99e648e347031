"""What benchmarks measured, as Markdown for the README: speed, growth, noise, warnings, GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from benchmarks import alarms
from benchmarks.ratios import spread
from rlhf_lib.catalogue import label
from rlhf_lib.measure.statistics import interval
from rlhf_lib.show.display import markdown
from rlhf_lib.show.tables import table_of

# items a second of this library over the peer's, in one run
ANYWHERE = {"ppo": 2.0, "generation": 2.0}
TARGETS = {
    "cpu": {"sft": 3.0, "reward_model": 2.5, "dpo": 6.0, "grpo": 3.0, **ANYWHERE},
    "cpu with AMX": {"sft": 4.0, "reward_model": 3.0, "dpo": 6.0, "grpo": 4.0, **ANYWHERE},
    "gpu": dict.fromkeys(("sft", "reward_model", "dpo", "grpo", "ppo"), 2.0) | {"generation": 5.0},
}
TRAINING = ("sft", "reward_model", "dpo")  # stages that only train: a share of the roof is wanted
ROOF_TARGETS = {"cpu": 0.6, "cpu with AMX": 0.3, "gpu": 0.3}


def summary(results: Mapping) -> str:
    """Of a comparison, of how cost grows, or of what a GPU showed, as the keys tell."""
    if "axes" in results:
        return growth_summary(results)
    if "cpu_seconds" in results:
        return stages_summary(results)
    if "ways" in results:
        return engines_summary(results)
    if "warnings" in results:
        return alarms.summary(results)
    if "studies" in results:
        return studies_summary(results)
    if isinstance(results.get("pairs"), list):
        return noise_summary(results)
    return gpu_summary(results) if "parts" in results else benchmark_summary(results)


def benchmark_summary(results: Mapping) -> str:
    """What was compared on which machine, the table of stages, and the targets, as Markdown."""
    env, settings, stages = results["environment"], results["settings"], results["stages"]
    tokens = settings["mean_tokens"]
    cores = ", ".join(filter(None, (env.get("cpu"), f"{env['cpu_cores']} CPU cores")))
    threads = "one thread" if env["threads"] == 1 else f"{env['threads']} threads"
    machine = env["gpu"] or f"{cores}, {threads}"
    rounds = "one round" if settings["rounds"] == 1 else f"{settings['rounds']} rounds"
    head = (
        f"{machine}; {settings['precision']}; matmul roof "
        f"{results['roof']['flops_per_second'] / 1e9:,.0f} GFLOP/s. A round has "
        f"{settings['pairs']} pairs (mean tokens: prompt {tokens['prompt']:.0f}, chosen "
        f"{tokens['chosen']:.0f}, rejected {tokens['rejected']:.0f}) in batches of "
        f"{settings['batch_size']}, or {settings['samples']} samples of "
        f"{settings['max_new_tokens']} new tokens at most in steps of "
        f"{settings['samples_per_step']}; {settings['processes']} pairs of processes with "
        f"{rounds} each after a warm-up, in turn. Peers: TRL "
        f"{results['peer_packages']['trl']}, transformers "
        f"{results['peer_packages']['transformers']}."
    )
    targets = _benchmark_targets(stages, ROOF_TARGETS[_kind(env)])
    parts = [head, markdown(benchmark_table(results)), *targets]
    prediction = results.get("prediction")
    if prediction and prediction["hours"] is not None and env["threads"] > 1:  # all was measured
        parts.append(prediction_summary(prediction))
    return "\n\n".join(parts)


def benchmark_table(results: Mapping) -> pd.DataFrame:
    """One row a stage: both sides' rates and memory, the ratio with its interval, the target."""
    targets = TARGETS[_kind(results["environment"])]
    rows = [_stage(name, found, targets.get(name)) for name, found in results["stages"].items()]
    return pd.DataFrame(rows)


def _kind(environment: Mapping) -> str:
    """What of a machine decides what can be wanted of it."""
    if environment["gpu"]:
        return "gpu"
    return "cpu with AMX" if "AMX" in (environment.get("cpu") or "") else "cpu"


def _stage(name: str, record: Mapping, target: float | None) -> dict[str, str]:
    ours, theirs = record["library"], record["peer"]
    return {
        "stage": name.replace("_", " "),
        "peer": record["peer_name"],
        "items/s": _range(ours["items_per_second"]),
        "peer's": _range(theirs["items_per_second"]),
        "tokens/s": f"{ours['tokens_per_second']['median']:,.0f}",
        "of the roof": f"{ours['roof_share']['median']:.0%}",
        "peer's share": f"{theirs['roof_share']['median']:.0%}",
        "GB": f"{ours['peak_memory_gb']:.1f}",
        "peer's GB": f"{theirs['peak_memory_gb']:.1f}",
        "ratio": interval(record["ratio"], 1),
        "target": _target(record["ratio"], target, _bound(name, record)),
    }


def _range(spread: Mapping) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"


def _target(ratio: Mapping, wanted: float | None, bound: float | None) -> str:
    """Reached or missed where the whole interval lies on one side, and undecided elsewhere; out of
    reach where the peer itself is too near to the roof."""
    if wanted is None:
        return "–"
    if ratio["low"] >= wanted:
        verdict = "reached"
    else:
        verdict = "missed" if ratio["high"] < wanted else "undecided"
        if bound is not None and bound < wanted:
            verdict += ", out of reach"
    return f"≥ {wanted:g}: {verdict}"


def _bound(name: str, record: Mapping) -> float | None:
    """How many times as fast as its peer anybody could be who computes at the roof; None where
    memory binds, as in decoding, and of what repeats a stage."""
    if name == "generation" or name.endswith("_plain"):
        return None
    return 1 / record["peer"]["roof_share"]["median"]


def _benchmark_targets(stages: Mapping, share: float) -> list[str]:
    """The two targets that are no ratio of speed: share of the roof, and memory."""
    training = {stage: stages[stage] for stage in TRAINING if stage in stages}
    shares = {s: r["library"]["roof_share"]["median"] >= share for s, r in training.items()}
    memory = {stage: record["memory_ratio"] <= 1 for stage, record in stages.items()}
    return [
        *_bounds(stages),
        f"Target, {share:.0%} of the roof in training steps: {_reached(shares)}.",
        f"Target, no more memory than the peer: {_reached(memory)}.",
        "The roof is the best matrix product of the model's own shapes. Both sides are credited "
        "with the same work: each prompt once, every reply, no padding, and the output layer at "
        "reply tokens only. Ratios are of items a second, geometric means with 95 % intervals over "
        "pairs of processes; rates are medians with their range.",
    ]


def _bounds(stages: Mapping) -> list[str]:
    """What bounds the ratios, stage by stage."""
    bounds = [
        f"{bound:.1f} in {name.replace('_', ' ')}"
        for name, record in stages.items()
        if (bound := _bound(name, record)) is not None
    ]
    said = (
        "The peer's share bounds every ratio: who spent time on nothing but products, all at the "
        "roof, would be this many times as fast"
    )
    return [f"{said}: {', '.join(bounds)}."] if bounds else []


def _reached(stages: Mapping[str, bool]) -> str:
    parts = [
        f"{word} for {', '.join(name.replace('_', ' ') for name in names)}"
        for word, wanted in (("reached", True), ("missed", False))
        if (names := [stage for stage, held in stages.items() if held is wanted])
    ]
    return "; ".join(parts) or "not measured"


def prediction_summary(prediction: Mapping) -> str:
    """Work and time of each stage of a profile, and what they were derived from, as Markdown."""
    total = {**prediction, "stage": "all, one seed", "items": ""}
    rows = [
        {
            "stage": row["stage"].replace("_", " "),
            "items": row["items"] and f"{row['items']:,}",
            "PFLOP": f"{row['flops'] / 1e15:,.1f}",
            "hours": "not measured" if row["hours"] is None else f"{row['hours']:,.1f}",
        }
        for row in (*prediction["stages"], total)
    ]
    text = (
        f"Profile `{prediction['profile']}` with GPT-2: FLOPs counted from its settings, and hours "
        f"at the rates above ({prediction['device']})."
    )
    if prediction["gpu"] is None:
        text += " The FLOPs hold for any device, the hours are this CPU's."
    return f"{text}\n\n{markdown(pd.DataFrame(rows))}"


def noise_summary(results: Mapping) -> str:
    """Each comparison of a study: its variance asked plainly and as a study asks, what it sees."""
    rows = [
        {
            "difference": " − ".join(label(name) for name in row["pair"].split("_minus_")),
            "variance, plain": f"{row['plain']['variance']:.5f}",
            "as asked": f"{row['study']['variance']:.5f}",
            "÷": interval(row["times_less"], 1),
            "detectable": _size(row["study"]["detectable"]),
            "by the corrected p": _size(row["corrected"]),
            "seeds for what is wanted": _seeds(row, "seeds"),
            "by the corrected p ": _seeds(row, "seeds_corrected"),
        }
        for row in results["pairs"]
    ]
    where = results["environment"].get("cpu", "")
    return "\n\n".join([
        f"Profile {results['profile']}, {results['seeds']} seeds{f', {where}' if where else ''}. A "
        "variance is that of a mean difference in gold reward. Detectable: the true difference "
        "found by 80 of 100 such studies, alone and as the first of its family. ÷: how many times "
        "the first variance is the second, with a 95 % interval as of two independent estimates "
        "that know no more than the seeds' spread does. Seeds are reckoned from the spread of "
        f"{results['seeds']}, which is itself not well known.",
        markdown(pd.DataFrame(rows)),
    ])  # fmt: skip


def _size(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _seeds(row: Mapping, key: str) -> str:
    return str(row[key] or "more than 50") if key in row else "–"


def stages_summary(results: Mapping) -> str:
    """CPU-seconds of each stage by an earlier code and by the present one."""
    before, after = results["cpu_seconds"]
    everything = {name: (before[name], after[name]) for name in before}
    everything["all"] = (sum(before.values()), sum(after.values()))
    rows = [
        {
            "stage": name.replace("_", " "), "CPU-seconds before": f"{old:.0f}",
            "now": f"{new:.0f}", "before ÷ now": f"{old / new:.2f}",
        }
        for name, (old, new) in everything.items()
    ]  # fmt: skip
    env = results["environment"]
    return (
        f"Profile {results['profile']}, seed {results['seed']}, one thread each, side by side on "
        f"{env.get('cpu', 'a CPU')}; code of {' and '.join(results['commits'])}; one run.\n\n"
        f"{markdown(pd.DataFrame(rows))}"
    )


def studies_summary(results: Mapping) -> str:
    """Wall time and memory of whole studies over seeds and jobs."""
    rows = [
        {
            "seeds": case["seeds"], "jobs": case["jobs"],
            "minutes": f"{case['seconds'] / 60:.1f}", "GB": f"{case['peak_gb']:.1f}",
        }
        for case in results["studies"]
    ]  # fmt: skip
    env, note = results["environment"], results.get("note", "")
    return (
        f"Profile {results['profile']}, with notebooks and report, on {env.get('cpu', 'a CPU')}, "
        f"{env['cpu_cores']} cores; one run each.{f' {note}' if note else ''}\n\n"
        f"{markdown(pd.DataFrame(rows))}"
    )


def engines_summary(results: Mapping) -> str:
    """What each way took, as Markdown."""
    first = results["ways"][0]["seconds"]
    columns = [
        ("who", lambda way: way["way"]),
        ("minutes", lambda way: f"{way['seconds'] / 60:.1f}"),
        ("in order ÷ this", lambda way: f"{first / way['seconds']:.2f}"),
        ("GB", lambda way: f"{way['peak_gb']:.1f}"),
    ]
    env = results["environment"]
    return (
        f"All stages of profile {results['profile']}, seeds: {results['seeds']}, without notebooks "
        f"and report, on {env.get('cpu', 'a CPU')}, {env['cpu_cores']} cores; one run each, "
        f"starting included.\n\n{markdown(table_of(results['ways'], columns))}"
    )


def growth_summary(results: Mapping) -> str:
    """How the time of one round grows with each quantity, the others held."""
    rows = [
        {
            "what grows": axis.replace("_", " "),
            "from": f"{found['values'][0]:,}",
            "to": f"{found['values'][-1]:,}",
            "seconds, from": f"{found['seconds'][0]:.2f}",
            "to ": f"{found['seconds'][-1]:.2f}",
            "slope": f"{found['slope']:.2f}",
        }
        for axis, found in results["axes"].items()
    ]
    return (
        f"{markdown(pd.DataFrame(rows))}\n\nThe slope is that of log seconds over log quantity: 1 "
        "is proportional, 0 costs nothing more. A small model, one quantity at a time."
    )


def gpu_summary(results: Mapping) -> str:
    """What worked on a GPU, how much memory a T4's profile takes, and how fast it decodes."""
    parts, packages = results["parts"], results["environment"]["packages"]
    head = (
        f"{results['gpu']}; torch {packages['torch']}, transformers {packages['transformers']}. "
        f"{results.get('note', '')}"
    )
    told = [head.strip()]
    for name in ("smoke-fp16", "smoke-bf16"):
        if name in parts:
            told.append(_works(name, parts[name]))
    if "largest_difference_of_weights" in (killed := parts.get("resume", {})):
        told.append(
            f"PPO killed at step {killed['killed_at_step']} and resumed: its weights differ from "
            f"those of the run that nothing stopped by {killed['largest_difference_of_weights']:g}."
        )
    told += _passes(parts.get("passes", {}))
    tables = [
        _capped(parts),
        _decoding(parts.get("decoding", {})),
        _beside(parts),
        _on_a_t4(results),
    ]
    return "\n\n".join(told + [table for table in tables if table])


def _passes(part: Mapping) -> list[str]:
    """How far the gradients of recorded passes are from those of plain ones."""
    apart = [
        f"{found['largest_difference']:g} of {found['largest_gradient']:.3g} in {precision}"
        for precision, found in part.items()
        if isinstance(found, Mapping) and found["recordings"]  # else both were plain
    ]
    said = (
        "Gradients of recorded passes (`rlhf_lib/models/graphs.py`) differ from those of plain ones"
    )
    return [f"{said} by at most {', '.join(apart)}."] if apart else []


def _beside(parts: Mapping) -> str:
    """Training steps beside TRL's."""
    found = parts.get("compare", {})
    if not found.get("stages"):
        return ""
    settings = found["settings"]
    return (
        f"Training beside TRL {found['peer_packages']['trl']}, {settings['precision']}, GPT-2's "
        f"size, {settings['pairs']} pairs in batches of {settings['batch_size']} or "
        f"{settings['samples']} samples of {settings['max_new_tokens']} tokens a round; roof "
        f"{found['roof']['flops_per_second'] / 1e12:,.0f} TFLOP/s; ratios over "
        f"{settings['processes']} pairs of processes:\n\n{markdown(benchmark_table(found))}"
    )


T4_PEAK = 65e12  # FLOPs a second in fp16: NVIDIA T4 Tensor Core GPU, datasheet, 2019


def _on_a_t4(results: Mapping) -> str:
    """Minutes of the profile `t4`, between what a T4 does at its peak and at this card's share."""
    if "t4" not in results:
        return ""
    stages = results["parts"]["compare"]["stages"]
    rows = []
    for row in results["t4"]["stages"]:
        if (rate := row["rate_of"]) in stages:
            share = stages[rate]["library"]["roof_share"]["median"]
            rows.append({
                "stage": row["stage"].replace("_", " "),
                "TFLOP": f"{row['flops'] / 1e12:,.0f}",
                "minutes on this card": f"{60 * row['hours']:.1f}",
                "on a T4, at least": f"{row['flops'] / T4_PEAK / 60:.1f}",
                "at this card's share": f"{row['flops'] / T4_PEAK / share / 60:.1f}",
            })  # fmt: skip
    said = (
        "Profile `t4` with GPT-2, stages whose rate was measured. A T4 was not: its minutes are "
        f"those at its published peak of {T4_PEAK / 1e12:.0f} TFLOP/s, and at the share that "
        "this card reached of its own measured matmul roof:"
    )
    return f"{said}\n\n{markdown(pd.DataFrame(rows))}"


def _works(name: str, part: Mapping) -> str:
    stages = {stage: found for stage, found in part.items() if isinstance(found, Mapping)}
    failed = [stage for stage, found in stages.items() if "error" in found]
    ended = {stage: found for stage, found in stages.items() if stage not in failed}
    odd = [stage for stage, found in ended.items() if found["not_finite"]]
    skipped = sum(found["skipped"] for found in ended.values())
    return (
        f"`{name}`: {len(ended)} of {len(stages)} stages ended"
        + (f" (not {', '.join(failed)})" if failed else "")
        + (f"; numbers that are not finite in {', '.join(odd)}" if odd else "; all numbers finite")
        + f"; {skipped:.0f} steps skipped."
    )


def _capped(parts: Mapping) -> str:
    """Peak memory of each stage of `t4` at GPT-2's size, in both precisions."""
    rows = []
    for stage, found in parts.get("t4-fp16", {}).items():
        if isinstance(found, Mapping) and "error" not in found:
            half = parts.get("t4-bf16", {}).get(stage, {})
            rows.append({
                "stage": stage.replace("_", " "),
                "GB in fp16": f"{found['peak_memory_gb']:.1f}",
                "in bf16": f"{half['peak_memory_gb']:.1f}" if "peak_memory_gb" in half else "–",
                "fp16 steps": found["steps"],
                "skipped": f"{found['skipped']:.0f}",
            })  # fmt: skip
    said = "Profile `t4` at GPT-2's size with random weights, under a cap of 15 GB:"
    return f"{said}\n\n{markdown(pd.DataFrame(rows))}" if rows else ""


def _decoding(part: Mapping) -> str:
    """Tokens a second of each way to decode, and the first call, which sets things up."""
    rows = []
    for key, found in part.items():
        if isinstance(found, Mapping):
            count, _, side = key.partition(" rows, ")
            rows.append({
                "rows": count,
                "decoded by": side,
                "tokens/s": f"{spread(found['tokens_per_second'])['median']:,.0f}",
                "lowest": f"{min(found['tokens_per_second']):,.0f}",
                "highest": f"{max(found['tokens_per_second']):,.0f}",
                "first call, s": f"{found['first_seconds']:.1f}",
            })  # fmt: skip
    said = "Decoding 128 tokens a row, medians of four calls"
    if "equal_in_fp32" in part:
        said += (
            f" (in fp32, recorded and step by step, {part['equal_in_fp32']:.0%} of a reply is the "
            "same up to the first difference)"
        )
    said += ":"
    return f"{said}\n\n{markdown(pd.DataFrame(rows))}" if rows else ""
