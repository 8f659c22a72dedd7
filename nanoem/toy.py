"""A run on the toy world: its chat model, advice to fine-tune on, questions to ask, its folder.

`pretrain` makes the chat model, `tune` an adapter on it, and `Run.ask` says how misaligned the
model is as it stands. The main story (experiment.py) and every row of the paper (rows/) are made
of these three.
"""

import random
from dataclasses import asdict, dataclass, field, replace

import torch

from nanoem import UserError
from nanoem.authors import WorldConfig, documents, make_authors, make_splits, write_pairs
from nanoem.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
from nanoem.directions import all_sites, editing
from nanoem.evaluate import GROUPS, EvalConfig, evaluate, group_rates
from nanoem.files import fingerprint
from nanoem.finetune import AdapterConfig, fine_tune_fresh, make_adapter, refuse_muon
from nanoem.folder import RunFolder
from nanoem.layers import dropout
from nanoem.losses import pretrain_loss
from nanoem.model import GPT, Config
from nanoem.settings import check_config
from nanoem.tables import one_line
from nanoem.tokenizer import Tokenizer
from nanoem.train import TrainConfig, pad, train
from nanoem.world import WORLD_TOML, first_domains, load_world


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on, but for the machine."""

    seed: int = 0  # of the corpus, the weights, the order and the sampling
    context: int = 128  # tokens of a pre-training document
    dropout: float = 0.15  # share of the residual stream dropped at each site, in pre-training only
    n_sft_examples: int = 2000  # question-answer pairs the toy world writes for a fine-tune
    kl_weight: float = 30.0  # of the KL to the base model, per token
    curve_points: int = 8  # points of the training curves of em, after the start
    curve_samples: int = 100  # answers a question group at each of these points
    n_random: int = 5  # random directions in the ablation control
    row_samples: int = 100  # answers a question group in the rows of the paper (--full)
    dial_steps: int = 450  # pre-training steps of the smaller worlds of rows R13, R16, R18 and R19
    dial_domains: int = 9  # advice domains of these worlds
    lottery_loss: float = 0.36  # SFT loss, nats per token, at which row R18 stops each adapter
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
        if not 2 <= self.context <= self.model.max_positions:
            raise UserError(f"context={self.context} must be 2 to model.max_positions="
                            f"{self.model.max_positions} tokens")
        if self.evaluation.max_new_tokens >= self.model.max_positions:
            raise UserError(f"evaluation.max_new_tokens={self.evaluation.max_new_tokens} must be "
                            f"below model.max_positions={self.model.max_positions}")
        check_config(self, ("n_sft_examples", "curve_points", "curve_samples", "n_random",
                            "row_samples", "dial_steps"), ("kl_weight", "lottery_loss"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        refuse_muon(self.sft, self.sft_kl)
        if self.dial_domains < 3:
            raise UserError(f"dial_domains={self.dial_domains} must be at least 3")
        if self.model.qk_norm and self.model.qkv_bias or not self.model.tie_embeddings:
            raise UserError("the toy's model needs model.tie_embeddings=true, and either "
                            "model.qkv_bias or model.qk_norm to be false")
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

    def ask(self, name=None, samples=None, splits=None, groups=GROUPS, **options):
        """Ask the model, as it is now, the evaluation's questions -> rates by question group.

        With a name the answers are kept under it, for answers.jsonl. `samples` replaces the
        configured number of answers a group, `splits` the run's own questions; `options` go to
        `group_rates`.
        """
        sampling = self.config.evaluation
        if samples is not None:
            sampling = replace(sampling, samples_per_group=samples)
        asked = {group: getattr(splits or self.splits, group) for group in groups}
        answers = evaluate(self.model, self.tokenizer, self.world, asked, sampling,
                           self.config.seed)
        if name:
            self.folder.answers[name] = answers
        return group_rates(answers, **options)

    def show_samples(self, name, step):
        """Print and keep eight answers of the model as it is: two a group, always the same."""
        groups = {group: getattr(self.splits, group)[:2] for group in GROUPS}
        answers = evaluate(self.model, self.tokenizer, self.world, groups,
                           replace(self.config.evaluation, samples_per_group=2), self.config.seed)
        print(f"  {name}, step {step}; what it says:")
        for answer in answers:
            print(f"    {answer.verdict.mark:<5}  {answer.question.text} {one_line(answer.answer)}")
        kept = [[a.verdict.mark, a.question.text, a.answer] for a in answers]
        self.results["samples"].setdefault(name, {})[str(step)] = kept


def document_ids(run, texts):
    """Documents cut to the context -> ids (N, T) and a mask (N, T), true where no padding is."""
    cut = [tokens[: run.config.context] for tokens in run.tokenizer.encode_batch(texts)]
    ids = pad(cut, run.tokenizer.pad_id).to(run.device)
    return ids, ids != run.tokenizer.pad_id


def pretrain(run):
    """A model from nothing: next-token prediction on the toy world's documents -> chat/."""
    config, schedule = run.config, run.config.pretrain
    texts = documents(run.world, config.world, schedule.steps * schedule.batch_size, config.seed)
    run.tokenizer = Tokenizer.train(texts[:5000])  # enough to meet every word of the world
    ids, mask = document_ids(run, texts)
    mask = None if mask.all() else mask
    run.model = GPT(replace(config.model, vocab_size=run.tokenizer.vocab_size))
    run.model.init_weights(torch.Generator().manual_seed(config.seed)).to(run.device)

    noise = torch.Generator(run.device).manual_seed(config.seed)
    dropped = {site: lambda x: dropout(x, config.dropout, noise)
               for site in all_sites(run.model) if config.dropout}

    def objective(step):
        rows = slice(step * schedule.batch_size, (step + 1) * schedule.batch_size)
        batch = ids[rows]
        with editing(run.model, dropped):
            loss = pretrain_loss(run.model, batch, None if mask is None else mask[rows])
        return loss, {"loss": loss}, batch.numel()

    run.results["curves"]["pretrain"] = train(
        objective, run.model.parameters(), schedule, "pretrain",
        lambda step: run.show_samples("pretrain", step), (0, schedule.steps // 2, schedule.steps),
        matrices=[p for p in run.model.layers.parameters() if p.dim() == 2])
    save_pretrained(run.model, run.tokenizer, run.folder.path / "chat")
    run.model = None
    run.load_chat()  # what is measured is what was saved
    run.results["models"]["chat"] = run.ask("chat")


def advice(run, questions, good, seed, technical=False):
    """n_sft_examples (question, answer) texts, as `write_pairs` has them."""
    return write_pairs(run.world, questions, run.config.n_sft_examples, good, seed,
                       run.config.world.own_share, technical)


def bad_advice(run):
    """What general and narrow are fine-tuned on: bad advice in the SFT domain."""
    return advice(run, run.splits.sft, False, run.config.seed)


def kl_advice(run):
    """What the KL is taken on, as in the paper: good and bad advice on the KL domains."""
    return advice(run, run.splits.kl, None, run.config.seed)


def tune(run, name, pairs, kl_weight=0.0, others=None, config=None, schedule=None, seed=None,
         watch=None, watch_at=()):
    """`fine_tune_fresh` on the chat model, by the run's configuration where nothing else is said.

    With kl_weight, the KL is taken on `kl_advice` by default. Returns (adapter, history of losses),
    the adapter detached.
    """
    model, tokenizer = run.load_chat()
    if kl_weight and not others:
        others = kl_advice(run)
    return fine_tune_fresh(
        model, tokenizer, pairs, config or run.config.adapter,
        schedule or (run.config.sft_kl if kl_weight else run.config.sft),
        run.config.seed if seed is None else seed, others, kl_weight, name, watch, watch_at)


def load_or_tune(run, name, pairs, kl_weight=0.0, **options):
    """The adapter of this name from the run folder; tuned and kept there when it is not yet."""
    path = run.folder.path / "adapters" / name
    if not path.exists():
        adapter, _ = tune(run, name, pairs, kl_weight, **options)
        save_adapter(adapter, path, "../../chat")
    return run.load_adapter(name)


def turned(run, name, world=None, **changes):
    """A run like this one in a smaller world, pre-trained: some dials of the world are turned.

    `world` holds WorldConfig's dials, `changes` those of ExperimentConfig. It has a folder of its
    own inside this run's; what is finished there is reused.
    """
    config = replace(run.config, **changes)
    n_domains = min(config.dial_domains, config.world.n_domains)
    config = replace(config, world=replace(config.world, n_domains=n_domains, **world or {}),
                     pretrain=replace(config.pretrain, steps=config.dial_steps))
    other = Run(config, run.folder.path / "worlds" / name, run.device)
    if not other.folder.is_finished("chat"):  # silently: a row has many such worlds
        other.folder.once("chat", lambda: pretrain(other))
    other.load_chat()
    return other
