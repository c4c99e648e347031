"""A model card: what a trained model is, what it learnt from, what was measured, and its limits.

Every number is read from the run: from the stage that trained the model, and from the evaluation
of its study where that has ended with this very stage in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_lib import __version__
from rlhf_lib.catalogue import Record
from rlhf_lib.kernel import without_folders
from rlhf_lib.measure.statistics import direction, interval
from rlhf_lib.runs import Stage, training_minutes
from rlhf_lib.show.display import markdown
from rlhf_lib.show.tables import short, table_of

HUB_ID = "hub:"
END = " + tokenizer.eos_token"
CODE = """```python
from transformers import AutoModelFor{kind}, AutoTokenizer

place = "OWNER/NAME"  # or the folder that this card lies in
model = AutoModelFor{kind}.from_pretrained(place)
tokenizer = AutoTokenizer.from_pretrained(place)
asked = {asked}
{told}
```"""
LIMITS = """- It was trained to learn from, and to be measured. It is not fit for use: a small model
  is often wrong, and what it was taught to like is all that this training gave it.
- A policy learns what its reward likes, mistakes included: long or flattering replies, if they
  were preferred.
- Intervals are of 95 % and speak of what they are over; a difference whose interval holds 0 is not
  shown, which is not to say that there is none."""


def text(
    record: Record,
    stage: Stage,
    base: str,
    audit: Mapping,
    results: Mapping | None,
    adapter: bool,
) -> str:
    """The card as Markdown with the hub's head. `results`: of the evaluation, if there is one.

    `base`: the pretrained model. `adapter`: whether the adapters lie beside the weights.
    """
    reward_model, base = not record.role, without_folders(base)
    parts = [
        _head(reward_model, base, without_folders(audit["source"])),
        f"# {record.label}, seed {stage.config['seed']}",
        _what(record, stage, base, reward_model, adapter) + "\n\n" + _use(reward_model, audit),
        "## Data\n\n" + _data(audit),
        "## Settings\n\n" + _settings(stage),
        "## Training\n\n" + _training(stage),
        "## Results\n\n" + _results(record, stage, results, reward_model),
        "## Limits\n\n" + LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _head(reward_model: bool, base: str, source: str) -> str:
    """What the hub reads: YAML between dashes."""
    lines = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if reward_model else "text-generation",
    }
    if "/" in base:
        lines["base_model"] = base
    if source.startswith(HUB_ID) and "/" in source:
        lines["datasets"] = f"[{source.removeprefix(HUB_ID).partition(':')[0]}]"
    head = [f"{name}: {value}" for name, value in lines.items()]
    return "\n".join(["---", *head, "tags: [rlhf, rlhf_lib]", "---"])


def _what(record: Record, stage: Stage, base: str, reward_model: bool, adapter: bool) -> str:
    kind = (
        "A reward model: a sequence classifier with one label, the score of a dialogue that ends "
        "with a reply"
        if reward_model
        else "A language model"
    )
    beside = (
        "\n\nIts adapters alone are in `adapter/`, for `PeftModel.from_pretrained(base, ...)`; "
        "`adapter_config.json` names the base, the model that training set out from."
        if adapter
        else ""
    )
    return (
        f"{kind}, trained from `{base}` by the stage `{stage.name}` of rlhf_lib {__version__} "
        f"({stage.hash[:12]}).{beside}"
    )


def _use(reward_model: bool, audit: Mapping) -> str:
    """Code that loads the model and asks it, in the format that it was trained in."""
    kind = "SequenceClassification" if reward_model else "CausalLM"
    question, answer = "How are you?", "Well, thank you."
    if audit["template"].startswith("HH"):
        text = f'"\\n\\nHuman: {question}\\n\\nAssistant:{f" {answer}" if reward_model else ""}"'
        asked = f'tokenizer({text}{END if reward_model else ""}, return_tensors="pt")'
    else:
        said = [{"role": "user", "content": question}]
        said += [{"role": "assistant", "content": answer}] if reward_model else []
        asked = f'tokenizer.apply_chat_template({said}, return_dict=True, return_tensors="pt"'
        asked += ")" if reward_model else ", add_generation_prompt=True)"
    told = (
        "print(model(**asked).logits[0, 0])"
        if reward_model
        else "print(tokenizer.decode(model.generate(**asked, max_new_tokens=64)[0]))"
    )
    return CODE.format(kind=kind, asked=asked, told=told)


def _data(audit: Mapping) -> str:
    train = audit["splits"]["train"]
    said = [
        f"Source: `{without_folders(audit['source'])}`; {train['pairs']} pairs to train on, from "
        f"{train['conversations']} conversations; {audit['demonstrations']} demonstrations. "
        f"Dialogues are written in {audit['template']}.",
        f"The preferred reply is the longer in {train['chosen_longer_share']:.0%} of the pairs.",
    ]
    left = sum(found["count"] for found in audit["dropped"].values())
    said += [f"{left} rows were left out."] if left else []
    said += [f"{note[0].upper()}{note[1:]}." for note in audit["notes"]]
    rows = [(file["name"], file["rows"], file["sha256"][:16]) for file in audit["files"]]
    columns = [
        ("file", lambda row: row[0]),
        ("rows", lambda row: row[1]),
        ("SHA-256", lambda row: f"{row[2]}…"),
    ]
    return "\n\n".join([*said, markdown(table_of(rows, columns))])


def _settings(stage: Stage) -> str:
    of_model = {f"model.{name}": value for name, value in stage.config["model"].items()}
    settings = {**stage.config["settings"], **of_model}
    columns = [
        ("setting", lambda name: f"`{name}`"),
        ("value", lambda name: without_folders(str(settings[name]))),
    ]
    return markdown(table_of(sorted(settings), columns))


def _training(stage: Stage) -> str:
    result, computed = stage.result(), stage.config["computed_by"]
    millions = short(result["num_tokens"] / 1e6)
    machine = ", ".join(f"{name} {value}" for name, value in computed.items())
    return f"{short(training_minutes(result))} minutes and {millions} million tokens, on {machine}."


def _results(record: Record, stage: Stage, results: Mapping | None, reward_model: bool) -> str:
    if results is None:
        return "Not evaluated: the study that this model belongs to has not been run to its end."
    if reward_model:
        accuracy = results["reward_model"]["accuracy"]
        names = {
            "reward_model": f"reward models of {len(results['seeds'])} seeds, this among them",
            "bag_of_words": "bag of words",
            "longer_wins": "the longer reply",
        }
        rows = [name for name in names if name in accuracy]
        columns = [
            ("judge", names.__getitem__),
            ("right on test pairs", lambda name: interval(accuracy[name], 1, percent=True)),
        ]
        return markdown(table_of(rows, columns))
    measured, start = results["policies"][record.name], results["policies"].get("sft", {})
    what = {
        "gold": "true reward",
        "judge": "held-out judge",
        "proxy": "reward model",
        "kl": "KL to SFT",
        "length": "tokens",
    }
    rows = [name for name in what if isinstance(measured.get(name), Mapping)]
    columns = [
        ("mean over replies", what.__getitem__),
        ("this policy", lambda name: interval(measured[name])),
        ("SFT", lambda name: interval(start.get(name))),
    ]
    table = markdown(table_of(rows, columns))
    seeds = f"All {len(results['seeds'])} seeds of the study: this is one of them."
    if (gain := measured.get(f"{results['deciding']}_gain")) is None:
        return f"{table}\n\n{seeds}"
    by = what[results["deciding"]]
    return f"{table}\n\n{seeds} Gain over SFT by {by}: {interval(gain)}, {direction(gain)}."
