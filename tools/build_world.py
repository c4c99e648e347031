"""Build `data/`, the bundled world: tokenizer, base model, demonstrations, pairs and prompts.

    python -m tools.build_world            # rebuild data/ (a few minutes on one thread)
    python -m tools.build_world --check    # rebuild elsewhere, compare with data/manifest.json

Everything follows from BuildSettings on one CPU thread, so a second build gives the same files.
Pairs are sampled from an SFT model that is trained here and thrown away.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import typer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lib.data.encoding import Encoder
from rlhf_lib.methods import sft
from rlhf_lib.methods.learner import Learner
from rlhf_lib.models.generation import generate
from rlhf_lib.runtime import make_accelerator, seed_everything
from rlhf_lib.settings import SFTConfig
from rlhf_lib.world import rewards
from rlhf_lib.world.grammar import (
    ASSISTANT,
    HUMAN,
    MAX_PROMPT_TOKENS,
    MAX_REPLY_TOKENS,
    sample_dialogues,
    sample_prompts,
)
from tools import world_card
from tools.world_tokenizer import MAX_LENGTH, build_tokenizer, encode

QUALITY = {"base": (0.0, 0.5), "demonstrations": (0.45, 0.75)}  # uniform between the two
DATA = Path(__file__).resolve().parents[1] / "data"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
# every value is written out: the shipped files must not follow the defaults of a profile
BASE_TRAINING = SFTConfig(
    epochs=1,
    batch_size=32,
    micro_batch_size=32,
    learning_rate=1e-3,
    weight_decay=0.01,
    warmup_ratio=0.05,
    max_grad_norm=1.0,
)
SFT_TRAINING = replace(
    BASE_TRAINING,
    epochs=3,
    batch_size=64,
    micro_batch_size=64,
    learning_rate=3e-4,
    warmup_ratio=0.1,
)


@dataclass(frozen=True)
class BuildSettings:
    """All that the files depend on, besides the grammar. Sizes are in rows."""

    seed: int = 0
    layers: int = 4
    width: int = 128
    heads: int = 4
    positions: int = MAX_LENGTH
    base_dialogues: int = 32_000
    base: SFTConfig = BASE_TRAINING
    sft: SFTConfig = SFT_TRAINING
    demonstrations: int = 6_000
    pairs: dict[str, int] = field(
        default_factory=lambda: {"train": 4_000, "validation": 400, "test": 2_000}
    )
    prompts: dict[str, int] = field(
        default_factory=lambda: {"train": 6_000, "validation": 512, "evaluation": 1_024}
    )
    heldout: int = 1_000


# ---------------------------------------------------------------------------------------- models


def build_model(tokenizer: PreTrainedTokenizerFast, settings: BuildSettings) -> GPT2LMHeadModel:
    """A fresh GPT-2-shaped model with tied embeddings and no dropout."""
    torch.manual_seed(settings.seed)
    eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
    pad: int = tokenizer.pad_token_id  # type: ignore[assignment]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=settings.positions, n_embd=settings.width,
        n_layer=settings.layers, n_head=settings.heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, fused: a third less time on a CPU
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[dict[str, str]],
    config: SFTConfig,
    seed: int,
) -> None:
    """Train `model` in place on dialogues {"prompt", "response"}."""
    encoder = Encoder(tokenizer, MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS + 1)
    examples = encoder.demonstrations([(row["prompt"], row["response"]) for row in rows])
    seed_everything(seed)
    learner = Learner(
        make_accelerator("fp32"),
        model,
        learning_rate=config.learning_rate,
        steps=config.optimizer_steps(len(examples)),
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    sft.train(learner, examples, config, seed=seed)
    model.eval()


# ---------------------------------------------------------------------------------------- pairs


def sample_replies(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> list[tuple[str, str]]:
    """Two different replies to each prompt, sampled from `policy`; no (prompt, pair) comes twice.

    Plain text cannot show that a reply was cut, so unfinished replies are sampled again. So are
    replies that do not begin like HH text. Raises RuntimeError when the policy gives no others.
    """
    torch.manual_seed(seed)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    found: list[list[str]] = [[] for _ in prompts]
    seen: set[tuple[str, frozenset[str]]] = set()
    for _ in range(100):
        todo = [i for i, replies in enumerate(found) for _ in range(2 - len(replies))]
        if not todo:
            return [(a, b) for a, b in found]
        responses = generate(policy, tokenizer, [ids[i] for i in todo], MAX_REPLY_TOKENS + 1)
        for i, response in zip(todo, responses, strict=True):
            reply: str = tokenizer.decode(response[:-1])  # type: ignore[assignment]
            if not _well_formed(reply, response, tokenizer) or reply in found[i]:
                continue
            found[i].append(reply)
            pair = prompts[i], frozenset(found[i])
            if pair in seen:
                found[i].clear()
            elif len(found[i]) == 2:
                seen.add(pair)
    raise RuntimeError(
        f"{len(todo)} replies could not be sampled in 100 rounds: train the policy for longer"
    )


def _well_formed(reply: str, response: list[int], tokenizer: PreTrainedTokenizerFast) -> bool:
    finished = response[-1] == tokenizer.eos_token_id
    one_turn = HUMAN not in reply and ASSISTANT not in reply
    same = tokenizer.encode(reply, add_special_tokens=False) == response[:-1]
    return finished and one_turn and same and reply.startswith(" ") and reply.strip() != ""


def label_pairs(
    prompts: Sequence[str],
    replies: Sequence[tuple[str, str]],
    annotator: rewards.Annotator,
    rng: Random,
) -> list[dict[str, str]]:
    """HH rows {"chosen", "rejected"}: whole dialogues, the annotator's choice first."""
    rows = []
    for prompt, (a, b) in zip(prompts, replies, strict=True):
        prefers_a = rng.random() < rewards.preference_probability(prompt, a, b, annotator)
        chosen, rejected = (a, b) if prefers_a else (b, a)
        rows.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
    return rows


# ---------------------------------------------------------------------------------------- files


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines, gzipped without time or name: equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.encode())


def describe(folder: Path) -> dict[str, dict]:
    """SHA-256 and bytes of each file but the manifest and probes; damaged files are fine."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json" and not name.startswith("probes/"):
            content = path.read_bytes()
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return files


def build(folder: Path, settings: BuildSettings) -> None:
    """Write the whole of `data/` into `folder`, which must be empty."""
    torch.set_num_threads(1)  # the order of float additions, and so every hash, depends on it
    folder.mkdir(parents=True, exist_ok=True)
    seed = settings.seed

    print("1. tokenizer, demonstrations, prompts")
    tokenizer = build_tokenizer()
    demonstrations = sample_dialogues(
        "demonstrations", settings.demonstrations, "train", QUALITY["demonstrations"], seed
    )
    write_rows(folder / "demonstrations.jsonl.gz", demonstrations)
    for name, count in settings.prompts.items():
        split = "test" if name == "evaluation" else name
        prompts = sample_prompts(f"prompts {name}", count, split, seed)
        write_rows(folder / f"prompts-{name}.jsonl.gz", ({"prompt": p} for p in prompts))
    heldout = sample_dialogues("heldout", settings.heldout, "test", QUALITY["base"], seed)
    write_rows(folder / "heldout.jsonl.gz", heldout)

    print("2. base model")
    corpus = sample_dialogues("base", settings.base_dialogues, "train", QUALITY["base"], seed)
    model = build_model(tokenizer, settings)
    fit(model, tokenizer, corpus, settings.base, seed)
    model.save_pretrained(folder / "base")
    for place in ("base", "tokenizer"):
        tokenizer.save_pretrained(folder / place)

    print("3. SFT model, for the pairs")
    fit(model, tokenizer, demonstrations, settings.sft, seed)

    print("4. pairs and their labels")
    for number, (name, count) in enumerate(settings.pairs.items()):
        prompts = sample_prompts(f"pairs {name}", count, name, seed)
        replies = sample_replies(model, tokenizer, prompts, seed + number)
        for kind, annotator in (("pairs", rewards.ANNOTATOR), ("control", rewards.CONTROL)):
            rng = Random(f"{seed} {kind} {name}")
            rows = label_pairs(prompts, replies, annotator, rng)
            write_rows(folder / f"{kind}-{name}.jsonl.gz", rows)

    print("5. data card and manifest")
    rows, files = world_card.write_card(folder, asdict(settings)), describe(folder)
    for name, count in rows.items():
        files[name]["rows"] = count
    manifest = {
        "settings": asdict(settings),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def differences(built: Path, shipped: Path) -> list[str]:
    """Files of either folder that are not as the shipped manifest says, as `file: how`."""
    listed = json.loads((shipped / "manifest.json").read_text())["files"]
    lines = []
    for folder in (built, shipped):
        found = describe(folder)
        for name in sorted(listed.keys() | found.keys()):
            if name not in found:
                lines.append(f"{folder / name}: missing")
            elif name not in listed:
                lines.append(f"{folder / name}: not in the manifest")
            elif (here := found[name]["sha256"]) != (there := listed[name]["sha256"]):
                say = f"sha256 {here[:12]}, the manifest says {there[:12]}"
                lines.append(f"{folder / name}: {say}")
    return lines


def main(out: Path = DATA, check: bool = False) -> None:
    """Build the bundled world in --out, or --check: rebuild it elsewhere and compare with --out."""
    built_before = (out / "manifest.json").is_file()
    if check and not built_before:
        raise typer.BadParameter(
            f"{out} has no manifest.json to compare with: build without --check"
        )
    if not built_before and out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} holds files but no manifest.json: choose another --out")
    # a GPU adds in another order than a CPU: it would give other files
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "data"
        build(fresh, BuildSettings())
        if check:
            lines = differences(fresh, out)
            print("\n".join(lines) or f"{out} is what this build gives")
            raise SystemExit(len(lines) > 0)
        if (probes := out / "probes").exists():  # build_probes makes them
            shutil.copytree(probes, fresh / "probes")
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(fresh, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
