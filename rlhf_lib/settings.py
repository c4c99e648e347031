"""Settings: one frozen dataclass per stage, full sets of them by name, and how one is overridden.

The same way everywhere: `--set ppo.kl_coef=0.02` on the command line, the `OVERRIDES` string of a
notebook, or `papermill -p OVERRIDES "ppo.kl_coef=0.02"`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shlex
import types
import typing
from dataclasses import dataclass, field
from typing import ClassVar, Literal


class UserError(ValueError):
    """An error whose message says all; the command line shows no traceback for it."""


class SettingsError(UserError):
    """A profile, section or setting that does not exist, or a value that does not fit it."""


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how they are cut. Lengths are in tokens, sizes in rows."""

    source: str = "bundled"  # bundled | hub:NAME[:SUBSET] | path:FILE_OR_FOLDER
    max_prompt_tokens: int = 64  # cut from the left: the latest turns matter most
    max_response_tokens: int = 40  # including the end-of-sequence token
    train_pairs: int = 4000
    validation_pairs: int = 400
    test_pairs: int = 2000
    demonstrations: int = 6000  # for SFT; real sources use the chosen replies of the train pairs
    rl_prompts: int = 6000
    evaluation_prompts: int = 512  # each answered evaluation.samples_per_prompt times
    split_seed: int = 0  # which conversations go to which split; not the seed of a run
    judge_pairs: int = 0  # for a held-out judge, seen by nothing else; the bundled world has gold


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained language model everything starts from."""

    name: str = "tiny"  # tiny | smollm2-135m | gpt2 | a hub id | a folder
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # above 0: adapters are trained instead (learning rates about ten times up)
    lora_alpha: float = 16.0  # an adapter counts lora_alpha / lora_rank


@dataclass(frozen=True)
class RewardModelConfig:
    epochs: int = 2
    batch_size: int = 32  # pairs
    micro_batch_size: int = 8  # as much as a CPU's cache holds; gradients add up to the batch's
    learning_rate: float = 2e-4
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    center_coef: float = 0.001
    margin: float = 0.0  # used for every pair whose row carries no margin of its own
    curve_points: int = 3  # smaller models of the learning curve, each on a third of the next

    adam_eps: ClassVar[float] = 1e-8

    def optimizer_steps(self, rows: int) -> int:
        """Steps that training on this number of rows takes."""
        return self.epochs * -(-rows // self.batch_size)

    scoring_batch_size: ClassVar[int] = 32


@dataclass(frozen=True)
class SFTConfig:
    epochs: int = 2
    batch_size: int = 64  # dialogues
    micro_batch_size: int = 16
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0

    adam_eps: ClassVar[float] = 1e-8

    def optimizer_steps(self, rows: int) -> int:
        """Steps that training on this number of rows takes."""
        return self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection-sampling SFT: imitate the best of `samples` replies; batches are cut as in SFT."""

    prompts: int = 1024
    samples: int = 8  # to each prompt, from SFT; the reward model's favourite is imitated
    temperature: float = 1.0
    epochs: int = 2
    learning_rate: float = 1e-4

    scoring_batch_size: ClassVar[int] = 64


@dataclass(frozen=True)
class PPOConfig:
    updates: int = 24
    batch_size: int = 128  # prompts, one response each
    micro_batch_size: int = 16
    epochs: int = 2
    minibatch_size: int = 64
    learning_rate: float = 4e-5
    value_learning_rate: float = 3e-4
    temperature: float = 1.0
    kl_coef: float = 0.2  # per nat, on the normalised reward
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # in the reward; only k1 gives the KL's gradient
    kl_target: float = 0.0  # nats a response; above 0, kl_coef adapts until the KL is there
    kl_horizon: int = 2000  # responses in which it adapts
    low_kl_coef: float = 0.02  # of the under-regularised run that shows over-optimisation
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_model: Literal["separate", "shared"] = "separate"  # shared: one trunk, two heads
    value_coef: float = 0.1  # weight of the value loss in a shared trunk
    gamma: float = 1.0
    gae_lambda: float = 0.95
    reward: str = "model"  # model, gold, a rule, FILE.py:FUNCTION; several: 0.5*gold, model
    missing_eos_penalty: float = 1.0
    reward_clip: float = 5.0  # normalised reward is kept within plus and minus this
    reward_normalization: Literal["none", "batch", "running"] = "none"  # on top of the model's own
    max_grad_norm: float = 1.0

    # as in Huang et al. 2024, arXiv:2403.17031: no warm-up, no weight decay, Adam's epsilon
    adam_eps: ClassVar[float] = 1e-5
    warmup_ratio: ClassVar[float] = 0.0
    weight_decay: ClassVar[float] = 0.0

    @property
    def scoring_batch_size(self) -> int:
        return self.micro_batch_size

    def optimizer_steps(self, rows: int) -> int:
        """Steps that training takes; it samples its own rows."""
        return self.updates * self.epochs * -(-self.batch_size // self.minibatch_size)


@dataclass(frozen=True)
class GRPOConfig:
    updates: int = 30
    prompts_per_update: int = 16
    group_size: int = 8
    micro_batch_size: int = 16
    iterations: int = 2  # optimisation passes over each batch of samples
    learning_rate: float = 5e-5
    temperature: float = 1.0
    kl_coef: float = 0.0  # KL penalty in the loss (eq. 3 of arXiv:2402.03300)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of that penalty; k1 has no gradient on average
    kl_reward_coef: float = 0.2  # KL of the response taken off its reward, per nat
    kl_reward_estimator: Literal["k1", "k2", "k3"] = "k1"
    clip_low: float = 0.2
    clip_high: float = 0.2
    advantage: Literal["group", "leave_one_out"] = "group"  # leave_one_out: RLOO, has no scale
    scale: Literal["group", "batch", "none"] = "group"
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    dynamic_sampling: int = 1  # groups sampled for each one kept; those with signal come first
    mask_overlong: bool = False  # a response without its end gives no gradient
    reward: str = "model"  # as in PPO
    missing_eos_penalty: float = 1.0
    reward_clip: float = 5.0
    max_grad_norm: float = 1.0

    adam_eps: ClassVar[float] = 1e-5
    warmup_ratio: ClassVar[float] = 0.0
    weight_decay: ClassVar[float] = 0.0

    @property
    def scoring_batch_size(self) -> int:
        return self.micro_batch_size

    def optimizer_steps(self, rows: int) -> int:
        """Steps that training takes; it samples its own rows."""
        return self.updates * self.iterations


@dataclass(frozen=True)
class DPOConfig:
    epochs: int = 2
    batch_size: int = 64  # pairs
    micro_batch_size: int = 8
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.1
    loss: Literal["dpo", "dpo_normalised", "ipo", "simpo", "orpo", "kto"] = "dpo"
    # what beta weighs, and where to start: dpo, kto: a reply's log-ratio (0.1); dpo_normalised: its
    # mean over the tokens (5); ipo: log-ratios are to differ by 1 / (2 beta) (0.1); simpo: a
    # reply's mean log-prob (2); orpo: the odds ratio, beside the SFT term (0.1)
    beta: float = 0.1
    label_smoothing: float = 0.0  # share of labels taken to be wrong; of dpo and dpo_normalised
    simpo_margin: float = 1.0  # gamma of the paper; simpo asks for margin / beta nats a token
    desirable_weight: float = 1.0  # of chosen replies, in kto
    undesirable_weight: float = 1.0  # of rejected replies, in kto
    max_grad_norm: float = 1.0
    probes: int = 10  # how often the policy answers validation prompts during training
    probe_prompts: int = 128

    adam_eps: ClassVar[float] = 1e-8

    def optimizer_steps(self, rows: int) -> int:
        """Steps that training on this number of rows takes."""
        return self.epochs * -(-rows // self.batch_size)

    scoring_batch_size: ClassVar[int] = 64  # of what the policy says at a probe


@dataclass(frozen=True)
class SweepConfig:
    """Runs of seed 0 at other KL coefficients (beta in DPO), for the frontier of each method."""

    weaker: float = 0.25  # times the method's own coefficient; PPO has ppo.low_kl_coef
    stronger: float = 4.0  # 0 leaves the sweep out


@dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = 32  # of scoring; sampling takes more at once
    temperature: float = 1.0
    best_of_n: int = 64  # largest n; smaller powers of two come from the same samples
    best_of_n_prompts: int = 128
    samples_per_prompt: int = 2  # replies of each policy to each of data.evaluation_prompts
    heldout_texts: int = 256  # on which perplexity is measured
    bootstrap_samples: int = 2000
    probe_prompts: int = 24  # of each probe in data/probes
    probe_samples: int = 2  # replies to each of them

    @property
    def scoring_batch_size(self) -> int:
        return self.batch_size


@dataclass(frozen=True)
class JudgeConfig:
    """An outside judge behind an OpenAI-compatible endpoint. Off while `url` is empty."""

    url: str = ""  # such as https://host/v1; the key comes from the environment, OPENAI_API_KEY
    model: str = ""
    prompts: int = 64  # of each policy's replies beside SFT's; each is asked in both orders
    dollars_per_million_input: float = 0.0  # of the provider's price list, for the cost shown
    dollars_per_million_output: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A full set of stage settings. `checkpoint_minutes`: how often a stage saves its state."""

    name: str
    seeds: int = 1
    jobs: int = 1  # stages that run side by side on a CPU; never more than it has cores
    threads: int = 0  # of torch on a CPU, for each job; 0: one for each core
    checkpoint_minutes: float = 2.0
    methods: str = ""  # records of further methods, package.module:RECORD, separated by commas
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def unknown(kind: str, word: str, known: typing.Iterable[str]) -> SettingsError:
    """The error for a name that does not exist; it names the nearest ones that do."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
    listed = names if len(names) <= 12 else difflib.get_close_matches(word, names, 5, 0.3)
    label = "Known" if listed is names else "Near"
    return SettingsError(
        f"unknown {kind} {word!r}: did you mean {close!r}? {label}: {', '.join(listed)}"
    )


def as_dict(config: object) -> dict:
    """A settings record as plain JSON values."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def content_hash(value: object) -> str:
    """SHA-256 (hex) of a JSON-serialisable value; equal values give equal hashes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _real_pairs(name: str, source: str, model: str, **changes: dict) -> Profile:
    """Settings to start from with real pairs and a model of 124-135 M parameters, with changes."""
    start = {
        "data": dict(source=source, max_prompt_tokens=192, max_response_tokens=64),
        "model": dict(name=model),
        "reward_model": dict(epochs=1, learning_rate=2e-5, weight_decay=0.01),
        "sft": dict(epochs=1, batch_size=32, learning_rate=2e-5),
        "rejection": dict(epochs=1, learning_rate=1e-5),
        "ppo": dict(learning_rate=1e-5, value_learning_rate=1e-5, kl_coef=0.05, low_kl_coef=0.0),
        "grpo": dict(learning_rate=1e-5, kl_reward_coef=0.05),
        "dpo": dict(epochs=1, batch_size=32, learning_rate=5e-6),
        "sweep": {},
        "evaluation": {},
    }
    kinds = typing.get_type_hints(Profile)
    sections = {
        key: kinds[key](**{**values, **changes.get(key, {})}) for key, values in start.items()
    }
    return Profile(name=name, **sections)


HH = "hub:Anthropic/hh-rlhf"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="smoke",
            threads=1,
            data=DataConfig(
                train_pairs=128, validation_pairs=64, test_pairs=128, demonstrations=256,
                rl_prompts=128, evaluation_prompts=32,
            ),
            model=ModelConfig(precision="fp32"),
            reward_model=RewardModelConfig(epochs=1, curve_points=2),
            sft=SFTConfig(epochs=1),
            rejection=RejectionConfig(prompts=64, samples=4, epochs=1),
            ppo=PPOConfig(updates=3, batch_size=32, micro_batch_size=16, minibatch_size=16),
            grpo=GRPOConfig(updates=3, prompts_per_update=4, group_size=4, micro_batch_size=16),
            dpo=DPOConfig(epochs=1, probes=2, probe_prompts=16),
            evaluation=EvaluationConfig(
                best_of_n=8, best_of_n_prompts=32, heldout_texts=64, bootstrap_samples=200,
                probe_prompts=8, probe_samples=1,
            ),
        ),
        # the tiny model's matrices are too small for two threads, or for bf16, to pay
        Profile(name="laptop", seeds=3, jobs=3, threads=1, model=ModelConfig(precision="fp32")),
        _real_pairs(
            "offline",
            "path:pairs.jsonl.gz",
            "smollm2-135m",
            data=dict(
                max_prompt_tokens=128, train_pairs=1000, validation_pairs=100, test_pairs=500,
                demonstrations=1000, rl_prompts=1000, evaluation_prompts=48, judge_pairs=600,
            ),
            reward_model=dict(batch_size=16, micro_batch_size=8, curve_points=1),
            sft=dict(micro_batch_size=8),
            rejection=dict(prompts=96, samples=8),
            ppo=dict(updates=8, batch_size=32, minibatch_size=16, micro_batch_size=8),
            grpo=dict(updates=8, prompts_per_update=4, group_size=8, micro_batch_size=8),
            dpo=dict(micro_batch_size=8, probes=4, probe_prompts=16),
            sweep=dict(stronger=0.0),
            evaluation=dict(batch_size=16, best_of_n=8, best_of_n_prompts=24, heldout_texts=96,
                            probe_prompts=12, probe_samples=1),
        ),
        _real_pairs(
            "t4",
            HH,
            "gpt2",
            data=dict(train_pairs=10000, test_pairs=2000, demonstrations=10000,
                      evaluation_prompts=128, judge_pairs=10000),
            reward_model=dict(micro_batch_size=16),
            sft=dict(micro_batch_size=16),
            ppo=dict(updates=60, minibatch_size=32, micro_batch_size=16),
            grpo=dict(updates=60, micro_batch_size=16),
            dpo=dict(micro_batch_size=16),
            sweep=dict(stronger=0.0),
            evaluation=dict(best_of_n=16, best_of_n_prompts=64, batch_size=64),
        ),
        _real_pairs(
            "full",
            HH,
            "gpt2",
            data=dict(train_pairs=120000, validation_pairs=1000, test_pairs=8000,
                      demonstrations=120000, rl_prompts=50000, judge_pairs=40000),
            ppo=dict(updates=150, micro_batch_size=64),
            grpo=dict(updates=150, micro_batch_size=64),
        ),
    )
}  # fmt: skip


def load_profile(name: str, overrides: str | typing.Sequence[str] = ()) -> Profile:
    """The profile `name` with overrides applied.

    `overrides`: strings like `ppo.kl_coef=0.02`, or one string of them separated by spaces.
    Raises SettingsError for an unknown profile, section, setting, or a value of the wrong type.
    """
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    profile = PROFILES[name]
    items = shlex.split(overrides) if isinstance(overrides, str) else overrides
    for item in items:
        profile = _override(profile, item)
    return profile


def _override(profile: Profile, item: str) -> Profile:
    path, equals, text = item.partition("=")
    if not equals:
        raise SettingsError(f"override {item!r} has no '=': write it like ppo.kl_coef=0.02")
    section_name, dot, key = path.strip().partition(".")
    known = [f.name for f in dataclasses.fields(profile) if f.name != "name"]
    if section_name not in known:
        raise unknown("setting", path, _all_paths())
    section = getattr(profile, section_name)
    if not dataclasses.is_dataclass(section):
        if dot:
            raise unknown("setting", path, _all_paths())
        return dataclasses.replace(
            profile, **{section_name: _parse(Profile, section_name, path, text)}
        )
    if key not in {f.name for f in dataclasses.fields(section)}:
        raise unknown("setting", path, _all_paths())
    value = _parse(type(section), key, path, text)
    changed = dataclasses.replace(section, **{key: value})  # type: ignore[type-var]
    return dataclasses.replace(profile, **{section_name: changed})


def _all_paths() -> list[str]:
    paths = []
    for outer in dataclasses.fields(Profile):
        default = getattr(PROFILES["laptop"], outer.name)
        if dataclasses.is_dataclass(default):
            paths += [f"{outer.name}.{inner.name}" for inner in dataclasses.fields(default)]
        elif outer.name != "name":
            paths.append(outer.name)
    return paths


def _parse(owner: type, key: str, path: str, text: str) -> object:
    kind = typing.get_type_hints(owner)[key]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        if text.strip() not in typing.get_args(kind):
            raise unknown(f"{path} =", text.strip(), typing.get_args(kind))
        return text.strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        return kind(text.strip())
    except (KeyError, ValueError):
        raise SettingsError(f"{path}={text!r}: expected a value of type {kind.__name__}") from None
