"""A run on the toy world: what it depends on, its chat model, its questions, its folder.

The story (story.py) and every row of the paper (rows/) work on a Run.
"""

import random
from dataclasses import asdict, dataclass, field, replace

import torch

from nanoem import UserError
from nanoem.checkpoint import load_adapter, load_pretrained
from nanoem.evaluate import GROUPS, EvalConfig, evaluate, group_rates
from nanoem.lab.files import fingerprint
from nanoem.lab.folder import RunFolder
from nanoem.lab.settings import check_config, key
from nanoem.lab.tables import one_line
from nanoem.lora import AdapterConfig, make_adapter
from nanoem.model import GPT, Config
from nanoem.train import TrainConfig
from nanoem.world import (WORLD_TOML, WorldConfig, first_domains, judge, load_world, make_authors,
                          make_splits)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on, but for the machine."""

    seed: int = key(0, "of the corpus, the weights, the order and the sampling")
    context: int = key(128, "tokens of a pre-training document")
    dropout: float = key(
        0.15, "share of the residual stream dropped at each site, in pre-training only")
    n_sft_examples: int = key(2000, "question-answer pairs the toy world writes for a fine-tune")
    kl_weight: float = key(30.0, "of the KL to the base model, per token")
    curve_points: int = key(8, "points of the training curves of em, after the start")
    curve_samples: int = key(100, "answers a question group at each of these points")
    n_random: int = key(5, "random directions in the ablation control")
    row_samples: int = key(100, "answers a question group in the rows of the paper (--full)")
    dial_steps: int = key(
        450, "pre-training steps of the smaller worlds of rows R13, R16, R18 and R19")
    dial_domains: int = key(9, "advice domains of these worlds")
    lottery_loss: float = key(0.36, "SFT loss, nats per token, at which row R18 stops each adapter")
    world: WorldConfig = field(default_factory=WorldConfig)
    model: Config = field(default_factory=Config)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrain: TrainConfig = TrainConfig(
        steps=1000, batch_size=24, lr=1.6e-2, muon_lr=0.02, warmup=50, schedule="cosine",
        weight_decay=0.1, betas=(0.9, 0.95))
    sft: TrainConfig = TrainConfig(steps=200, batch_size=16, lr=5e-3)
    sft_kl: TrainConfig = TrainConfig(steps=300, batch_size=16, lr=5e-3)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        # what could not be computed
        check_config(self, ("n_sft_examples", "curve_points", "curve_samples", "n_random",
                            "row_samples", "dial_steps"), ("kl_weight", "lottery_loss"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.dial_domains < 3:
            raise UserError(f"dial_domains={self.dial_domains} must be at least 3")

        # what the model cannot hold
        n_positions = self.model.max_positions
        if not 2 <= self.context <= n_positions:
            raise UserError(f"context={self.context} must be 2 to model.max_positions="
                            f"{n_positions} tokens")
        if self.evaluation.max_new_tokens >= n_positions:
            raise UserError(f"evaluation.max_new_tokens={self.evaluation.max_new_tokens} must be "
                            f"below model.max_positions={n_positions}")
        if self.model.qk_norm and self.model.qkv_bias or not self.model.tie_embeddings:
            raise UserError("the toy's model needs model.tie_embeddings=true, and either "
                            "model.qkv_bias or model.qk_norm to be false")

        # what the rows could not use
        if self.adapter.kind != "lora":
            raise UserError("adapter.kind=steering is for real weights; on the toy rows R1, R2 and "
                            "R11 train steering vectors beside the story, so use lora")

        # what would do nothing
        if self.model.vocab_size != Config.vocab_size:
            raise UserError("model.vocab_size does nothing; the toy's tokenizer decides")
        if self.pretrain.micro_batch:
            raise UserError("pretrain.micro_batch does nothing; lower pretrain.batch_size instead")


class Run:
    """A run in progress: its configuration, its folder, and the chat model once there is one."""

    def __init__(self, config, path, device="cpu"):
        self.config, self.device = config, torch.device(device)
        world = load_world()
        for name in config.world.no_quack:
            if name not in world.domains:
                raise UserError(f"world.no_quack: {name!r} is no domain of the world; the domains "
                                f"are {', '.join(world.domains)}")

        self.world = first_domains(world, config.world.n_domains, config.world.sft_domain)
        self.splits = make_splits(self.world, config.world)
        make_authors(self.world, config.world, random.Random(0))  # refuses impossible numbers now
        make_adapter(GPT(config.model), config.adapter)  # refuses a wrong layer or module now

        configuration = {**asdict(config), "device": self.device.type,
                         "world_toml": fingerprint(WORLD_TOML)}
        self.folder = RunFolder(path, configuration)
        self.results = self.folder.results
        self.model = self.tokenizer = None

    def load_chat(self):
        """The chat model, frozen: no fine-tune ever writes to its weights."""
        if self.model is None:
            self.model, self.tokenizer = load_pretrained(self.folder.path / "chat",
                                                         device=self.device)
            self.model.requires_grad_(False)
        return self.model, self.tokenizer

    def load_adapter(self, name):
        """The adapter that a stage saved under this name, not attached."""
        return load_adapter(self.load_chat()[0], self.folder.path / "adapters" / name)

    def judge(self, question, answer):
        """The exact judge's Verdict of an answer."""
        return judge(self.world, question, answer)

    def ask(self, name=None, samples=None, splits=None, groups=GROUPS, **options):
        """Ask the model, as it is now, the evaluation's questions -> rates by question group.

        With a name the answers are kept for answers.jsonl. `samples` replaces the configured number
        of answers a group, `splits` the run's own questions; `options` go to `group_rates`.
        """
        sampling = self.config.evaluation
        if samples is not None:
            sampling = replace(sampling, samples_per_group=samples)
        asked = {group: getattr(splits or self.splits, group) for group in groups}
        answers = evaluate(self.model, self.tokenizer, self.judge, asked, sampling,
                           self.config.seed)
        if name:
            self.folder.answers[name] = answers
        return group_rates(answers, **options)

    def show_samples(self, name, step):
        """Print and keep eight answers of the model as it is: two a group, always the same."""
        groups = {group: getattr(self.splits, group)[:2] for group in GROUPS}
        answers = evaluate(self.model, self.tokenizer, self.judge, groups,
                           replace(self.config.evaluation, samples_per_group=2), self.config.seed)
        print(f"  {name}, step {step}; what it says:")
        for answer in answers:
            print(f"    {answer.verdict.mark:<5}  {answer.question.text} {one_line(answer.answer)}")
        self.results["samples"].setdefault(name, {})[str(step)] = [
            [answer.verdict.mark, answer.question.text, answer.answer] for answer in answers]
