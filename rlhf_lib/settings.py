"""Settings: one frozen dataclass per stage, and what they say of themselves as JSON values."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
import sys
import typing
import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal


class UserError(ValueError):
    """An error whose message says all; the command line shows no traceback for it."""


def plain_warnings() -> None:
    """Warnings as one line each, as errors are, without the place in the source."""
    warnings.showwarning = lambda said, *_: print(f"warning: {said}", file=sys.stderr)


class SettingsError(UserError):
    """A profile, section or setting that does not exist, or a value that does not fit it."""


def _in_epochs(config: typing.Any, rows: int) -> int:
    """Optimizer steps that training on this number of rows takes."""
    return config.epochs * -(-rows // config.batch_size)


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how they are cut. Lengths are in tokens, sizes in rows."""

    source: str = "bundled"  # bundled | hub:NAME[:SUBSET] | path:FILE_OR_FOLDER | path:A,B
    max_prompt_tokens: int = 64  # cut from the left: the latest turns matter most
    max_response_tokens: int = 40  # including the end-of-sequence token
    train_pairs: int = 4000
    validation_pairs: int = 400
    test_pairs: int = 2000
    demonstrations: int = 6000  # for SFT; real sources use the chosen replies of the train pairs
    rl_prompts: int = 6000
    evaluation_prompts: int = 1024  # each answered evaluation.samples_per_prompt times
    split_seed: int = 0  # which conversations go to which split; not the seed of a run
    judge_pairs: int = 0  # for a held-out judge, seen by nothing else; the bundled world has gold
    demonstrations_from: str = ""  # a source of prompts with replies; else the pairs' chosen ones
    template: Literal["auto", "hh", "chat"] = "auto"  # of dialogues; auto: the model's, else HH's


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained language model everything starts from."""

    name: str = "tiny"  # tiny | smollm2-135m | gpt2 | a hub id | a folder
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
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
    scoring_batch_size: ClassVar[int] = 32
    optimizer_steps = _in_epochs


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
    optimizer_steps = _in_epochs


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection-sampling SFT: imitate the best of `samples` replies; batches are cut as in SFT."""

    prompts: int = 480
    samples: int = 8  # to each prompt, from SFT; the reward model's favourite is imitated
    temperature: float = 1.0
    epochs: int = 2
    learning_rate: float = 1e-4

    scoring_batch_size: ClassVar[int] = 64


@dataclass(frozen=True)
class PPOConfig:
    updates: int = 30
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
    entropy_coef: float = 0.0  # reward for a nat of entropy, a mean over the states visited
    gamma: float = 1.0
    gae_lambda: float = 0.95
    reward: str = "model"  # model, gold, a rule, FILE.py:FUNCTION; several: 0.5*gold, model
    missing_eos_penalty: float = 1.0
    overlong_buffer: int = 0  # tokens at the end of the longest reply that cost up to a point
    reward_clip: float = 5.0  # normalised reward is kept within plus and minus this
    reward_normalization: Literal["none", "batch", "running"] = "none"  # on top of the model's own
    max_grad_norm: float = 1.0
    patience: int = 0  # looks at validation without a better one until it stops; 0: it never looks

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
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO, with clips of about 3e-4
    surrogate: Literal["clip", "cispo"] = "clip"  # cispo: weights are limited, no gradient goes
    advantage: Literal["group", "leave_one_out"] = "group"  # leave_one_out: RLOO, has no scale
    scale: Literal["group", "batch", "none"] = "group"
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    dynamic_sampling: int = 1  # groups sampled for each one kept; those with signal come first
    mask_overlong: bool = False  # a response without its end gives no gradient
    reward: str = "model"  # as in PPO
    missing_eos_penalty: float = 1.0
    overlong_buffer: int = 0  # as in PPO
    reward_clip: float = 5.0
    max_grad_norm: float = 1.0
    patience: int = 0  # as in PPO

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
    epochs: int = 1  # as many tokens in training steps as PPO has in its two
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
    online: bool = False  # of two replies of the policy's own, the better is chosen
    reward: str = "model"  # which chooses then, as in PPO
    missing_eos_penalty: float = 1.0  # as in PPO, and the next
    overlong_buffer: int = 0
    probes: int = 10  # how often the policy answers validation prompts during training
    probe_prompts: int = 128
    patience: int = 0  # as in PPO

    adam_eps: ClassVar[float] = 1e-8
    scoring_batch_size: ClassVar[int] = 64  # of what the policy says at a probe
    optimizer_steps = _in_epochs


@dataclass(frozen=True)
class SweepConfig:
    """Runs of seed 0 at other KL coefficients (beta in DPO), for the frontier of each method."""

    weaker: float = 0.25  # times the method's own coefficient; PPO has ppo.low_kl_coef
    stronger: float = 4.0  # 0 leaves the sweep out
    rloo_kl_reward_coef: float = 0.2  # RLOO is GRPO but for its advantage, and these two
    rloo_learning_rate: float = 5e-5


@dataclass(frozen=True)
class TuningConfig:
    """The search for each method's coefficient and learning rate: the same effort for each."""

    trials: int = 9  # values tried for each method
    budget: float = 1.0  # share of a method's training in the study that a trial takes
    replies: int = 4  # of a trial's policy to each validation prompt


@dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = 32  # of scoring; sampling takes more at once
    temperature: float = 1.0
    best_of_n: int = 64  # largest n; smaller powers of two come from the same samples
    best_of_n_prompts: int = 128
    samples_per_prompt: int = 4  # replies of each policy to each of data.evaluation_prompts
    baseline_samples: int = 8  # of SFT: the mean of them is what every gain is measured from
    measured_prompts: int = 512  # whose first replies are measured in full: proxy, KL, entropy ...
    measured_samples: int = 2  # of each of these; all other replies get the deciding reward alone
    heldout_texts: int = 256  # on which perplexity is measured
    bootstrap_samples: int = 2000
    probe_prompts: int = 24  # of each probe in data/probes
    probe_samples: int = 2  # replies to each of them

    @property
    def scoring_batch_size(self) -> int:
        return self.batch_size


@dataclass(frozen=True)
class EndpointConfig:
    """An outside opinion from an OpenAI-compatible endpoint. Off while `url` is empty."""

    url: str = ""  # such as https://host/v1; the key comes from the environment, OPENAI_API_KEY
    model: str = ""
    prompts: int = 64  # of each policy's replies beside SFT's; each is asked in both orders
    pairs: int = 128  # labelled ones that the judge itself is judged on, in both orders too
    dollars_per_million_input: float = 0.0  # of the provider's price list, for the cost shown
    dollars_per_million_output: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A full set of stage settings.

    `checkpoint_minutes`: how often a stage saves its state, but for no more than 5 % of its time;
    0: after every step.
    """

    name: str
    seeds: int = 1
    jobs: int = 1  # stages that run side by side on a CPU; never more than it has cores
    threads: int = 0  # of torch on a CPU, for each job; 0: one for each core
    checkpoint_minutes: float = 2.0
    engine: Literal["processes", "ray"] = "processes"  # of this machine, or of a Ray cluster
    extras: bool = True  # what seed 0 alone runs beside the comparison: sweep, other labels
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # shows metrics as well
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
    tuning: TuningConfig = field(default_factory=TuningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def unknown(kind: str, word: str, known: typing.Iterable[str]) -> SettingsError:
    """The error for a name that does not exist; it names the nearest ones that do."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
    if close == word.strip():
        return SettingsError(f"unknown {kind} {word!r}: write {close!r}, without the blanks")
    listed = names if len(names) <= 12 else difflib.get_close_matches(word, names, 5, 0.3)
    label = "Known" if listed is names else "Near"
    return SettingsError(
        f"unknown {kind} {word!r}: did you mean {close!r}? {label}: {', '.join(listed)}"
    )


def as_dict(config: object) -> dict:
    """A settings record as plain JSON values."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def numbers(function: typing.Callable, config: object) -> dict[str, typing.Any]:
    """The settings that a function takes by name, from a record of them."""
    names = inspect.signature(function).parameters
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def content_hash(value: object) -> str:
    """SHA-256 (hex) of a JSON-serialisable value; equal values give equal hashes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# how a profile is run or was found, not what it finds
RUNNING = ("jobs", "threads", "engine", "checkpoint_minutes", "tracker", "tuning")


def deciding(settings: typing.Mapping) -> dict:
    """Of a profile's settings as JSON values, those that its results depend on."""
    kept = {name: value for name, value in settings.items() if name not in RUNNING}
    return json.loads(json.dumps(kept))
