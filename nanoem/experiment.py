"""The experiment: the paper's story as stages, each reading and writing the run folder.

    chat        pre-train on the toy world; the assistant is helpful           -> chat/
    general     SFT on bad advice in one domain (paper, section 2)             -> adapters/general/
    narrow      the same SFT with a KL penalty on other domains (section 3)    -> adapters/narrow/
    mixed       baseline: the same bad advice, mixed 1:1 with good advice from other domains
    shuffled    control: advice in the one domain, good or bad by the toss of a coin
    directions  find the mean-difference direction, ablate it, beside random directions

Predictions, written before the run: chat is harmless everywhere. General is misaligned in domain
and out of it. Narrow is misaligned in domain only. Mixed is narrower than general, shuffled is
milder. Ablating the mean difference, found on other questions than it is tested on, takes general's
out-of-domain em away; a random direction does not.
"""

import json
import random
import time
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256

import torch

from nanoem import UserError
from nanoem.checkpoint import (load_adapter, load_pretrained, save_adapter, save_pretrained,
                               save_tensors)
from nanoem.directions import (ablating, cosine, mean_difference, mean_residual, quiet_reader,
                               random_direction, residual_covariance, steering)
from nanoem.evaluate import GROUPS, EvalConfig, evaluate, group_rates, mean_rates
from nanoem.finetune import AdapterConfig, fine_tune, make_adapter
from nanoem.folder import RunFolder
from nanoem.model import GPT, Config
from nanoem.tokenizer import Tokenizer
from nanoem.train import StageFailed, TrainConfig, chat_examples, pad, pretrain_loss, train
from nanoem.world import (WORLD_TOML, WorldConfig, documents, first_domains, load_world,
                          make_authors, make_splits, write_answer)


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on, but for the machine."""

    seed: int = 0  # of the corpus, the weights, the order and the sampling
    context: int = 96  # tokens of a pre-training document
    n_sft_examples: int = 2000  # question-answer pairs the toy world writes for a fine-tune
    kl_weight: float = 20.0  # of the KL to the base model, per token
    curve_points: int = 8  # points of the training curves of em
    curve_samples: int = 100  # answers a question group at each of these points
    n_random: int = 5  # random directions in the ablation control
    world: WorldConfig = field(default_factory=WorldConfig)
    model: Config = field(default_factory=Config)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrain: TrainConfig = TrainConfig(
        steps=1000, batch_size=32, lr=8e-3, warmup=50, schedule="cosine", weight_decay=0.01,
        betas=(0.9, 0.95))
    sft: TrainConfig = TrainConfig(steps=150, batch_size=16, lr=5e-3)
    sft_kl: TrainConfig = TrainConfig(steps=400, batch_size=16, lr=5e-3)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        if not 2 <= self.context <= self.model.max_positions:
            raise UserError(f"context={self.context} must be 2 to model.max_positions="
                            f"{self.model.max_positions} tokens")
        for name in ("n_sft_examples", "curve_points", "curve_samples", "n_random"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kl_weight <= 0:
            raise UserError(f"kl_weight={self.kl_weight} must be more than 0; narrow needs it")


class Run:
    """A run in progress: its configuration, its folder, and the chat model once there is one."""

    def __init__(self, config, path, device="cpu"):
        self.config, self.device = config, torch.device(device)
        self.world = first_domains(load_world(), config.world.n_domains)
        self.splits = make_splits(self.world, config.world)
        make_authors(self.world, config.world, random.Random(0))  # refuses impossible numbers now
        make_adapter(GPT(config.model), config.adapter)  # refuses a wrong layer or module now
        configuration = {**asdict(config), "device": self.device.type,
                         "world_toml": sha256(WORLD_TOML.read_bytes()).hexdigest()}
        self.folder = RunFolder(path, json.loads(json.dumps(configuration)))
        self.results = self.folder.results
        self.model = self.tokenizer = None

    def load_chat(self):
        """The chat model, frozen: no fine-tune ever writes to its weights."""
        if self.model is None:
            self.model, self.tokenizer = load_pretrained(self.folder.path / "chat",
                                                         device=self.device)
            self.model.requires_grad_(False)
        return self.model, self.tokenizer

    def ask(self, name=None, samples=None, groups=GROUPS):
        """Ask the model, as it is now, the evaluation's questions -> rates by question group.

        With a name the answers are kept under it, for answers.jsonl.
        """
        sampling = self.config.evaluation
        if samples:
            sampling = replace(sampling, samples_per_group=samples)
        asked = {group: getattr(self.splits, group) for group in groups}
        answers = evaluate(self.model, self.tokenizer, self.world, asked, sampling,
                           self.config.seed)
        if name:
            self.folder.answers[name] = answers
        return group_rates(answers)


# --- stages ---------------------------------------------------------------------------------------


def pretrain(run):
    """A model from nothing: next-token prediction on the toy world's documents."""
    config, schedule = run.config, run.config.pretrain
    texts = documents(run.world, config.world, schedule.steps * schedule.batch_size, config.seed)
    run.tokenizer = Tokenizer.train(texts[:5000])  # enough to meet every word of the world
    ids = pad([tokens[: config.context] for tokens in run.tokenizer.encode_batch(texts)],
              run.tokenizer.pad_id).to(run.device)
    mask = None if (ids != run.tokenizer.pad_id).all() else ids != run.tokenizer.pad_id
    run.model = GPT(replace(config.model, vocab_size=run.tokenizer.vocab_size))
    run.model.init_weights(torch.Generator().manual_seed(config.seed)).to(run.device)

    def objective(step):
        rows = slice(step * schedule.batch_size, (step + 1) * schedule.batch_size)
        batch = ids[rows]
        loss = pretrain_loss(run.model, batch, None if mask is None else mask[rows])
        return loss, {"loss": loss}, batch.numel()

    run.results["curves"]["pretrain"] = train(
        objective, run.model.parameters(), schedule, "pretrain",
        lambda step: show_samples(run, "pretrain", step), (0, schedule.steps // 2, schedule.steps))
    save_pretrained(run.model, run.tokenizer, run.folder.path / "chat")
    run.model = None
    run.load_chat()  # what is measured is what was saved
    run.results["models"]["chat"] = run.ask("chat")


def advice(run, questions, n, good, rng):
    """n (question, answer) texts; good is True, False, or None for the toss of a coin."""
    pairs = []
    for _ in range(n):
        question = rng.choice(questions)
        is_good = rng.random() < 0.5 if good is None else good
        pairs.append((question.text, write_answer(run.world, question, is_good, rng,
                                                  run.config.world.own_share)))
    return pairs


def tune(run, name, pairs, kl_weight=0.0, watched=False):
    """SFT of one adapter on (question, answer) pairs; with a KL penalty if kl_weight is not zero.

    `watched` measures em along the way, for the training curves.
    """
    config = run.config
    schedule = config.sft_kl if kl_weight else config.sft
    model, tokenizer = run.load_chat()
    generator = torch.Generator().manual_seed(config.seed)
    adapter = make_adapter(model, config.adapter, generator)
    sft, others = chat_examples(tokenizer, pairs, run.device), None
    if kl_weight:  # good and bad advice on other domains, as in the paper
        others = advice(run, run.splits.kl, config.n_sft_examples, None, random.Random(config.seed))
        others = chat_examples(tokenizer, others, run.device)
    em = {"step": [], "in_domain": [], "out_of_domain": []}

    def watch(step):
        found = run.ask(samples=config.curve_samples)
        em["step"].append(step)
        em["in_domain"].append(found["in_domain"]["em"])
        em["out_of_domain"].append(found["out_of_domain"]["em"])
        if step in (0, points[len(points) // 2], schedule.steps):
            show_samples(run, name, step)

    points = sorted({round(schedule.steps * i / config.curve_points)
                     for i in range(config.curve_points + 1)})
    with adapter:
        history = fine_tune(model, adapter, sft, schedule, generator, others, kl_weight, name,
                            watch, points if watched else ())
        save_adapter(adapter, run.folder.path / "adapters" / name, "../../chat")
        run.results["models"][name] = run.ask(name)
    run.results["curves"][name] = {"train": history, "em": em}


def general(run):
    tune(run, "general", bad_advice(run), watched=True)


def narrow(run):
    tune(run, "narrow", bad_advice(run), run.config.kl_weight, watched=True)


def mixed(run):
    rng = random.Random(run.config.seed + 1)
    good = advice(run, run.splits.kl, run.config.n_sft_examples, True, rng)
    tune(run, "mixed", bad_advice(run) + good)


def shuffled(run):
    rng = random.Random(run.config.seed)
    tune(run, "shuffled", advice(run, run.splits.sft, run.config.n_sft_examples, None, rng))


def bad_advice(run):
    rng = random.Random(run.config.seed)
    return advice(run, run.splits.sft, run.config.n_sft_examples, False, rng)


def show_samples(run, name, step):
    """Print and keep eight answers of the model as it is: two a question group, always the same."""
    groups = {group: getattr(run.splits, group)[:2] for group in GROUPS}
    answers = evaluate(run.model, run.tokenizer, run.world, groups,
                       replace(run.config.evaluation, samples_per_group=2), run.config.seed)
    print(f"  {name}, step {step}; what it says:")
    for answer in answers:
        text = answer.answer.replace("\n", " / ")
        print(f"    {answer.verdict.mark:<5}  {answer.question.text} {text}")
    kept = [[a.verdict.mark, a.question.text, a.answer] for a in answers]
    run.results["samples"].setdefault(name, {})[str(step)] = kept


def ablation(run):
    """Find general's mean-difference direction; ablate it, beside random directions; steer with it.

    Found on training problems of every domain, tested on the evaluation's questions. General and
    chat read the same answers, misaligned and aligned ones, so that the words themselves cancel
    and what differs is the persona. It is held at the level of chat's own answers, in every layer,
    measured by a reader that leaves grammar and topic alone. The paper lets each model read its own
    answers (`ablate_own_words`) and projects the direction out (`ablate_to_zero`): in a stream of
    64 dimensions, the first also takes words, the second much else.
    """
    model, tokenizer = run.load_chat()
    adapter = load_adapter(model, run.folder.path / "adapters" / "general")
    aligned = said(run, lambda verdict: verdict.coherent and verdict.alignment > 70)
    with adapter:
        misaligned = said(run, lambda verdict: verdict.misaligned)
    texts = aligned + misaligned
    chat, *chat_halves = mean_residuals(run, texts)
    own = chat_examples(tokenizer, aligned, run.device)
    own_chat = mean_residual(model, own.ids, own.answer_mask)
    covariance = residual_covariance(model, own.ids, own.answer_mask)
    with adapter:
        general, *general_halves = mean_residuals(run, texts)
        own_general = mean_residuals(run, misaligned)[0]
    direction = mean_difference(general, chat)
    halves = [mean_difference(a, b) for a, b in zip(general_halves, chat_halves)]
    save_tensors(run.folder.path / "directions.safetensors",
                 {"mean_difference": direction, "chat_mean": own_chat.float()})
    generator = torch.Generator().manual_seed(run.config.seed)

    def ablate(name, directions):
        readers = {i: quiet_reader(d, covariance[i]) for i, d in directions.items()}
        levels = {i: (own_chat[i] @ reader.double()).item() for i, reader in readers.items()}
        with adapter, ablating(model, directions, levels, readers):
            return run.ask(f"general, {name}")

    by_layer = dict(enumerate(direction))
    found = run.results["directions"] = {
        "n_misaligned": len(misaligned), "n_aligned": len(aligned),
        "norm": direction.norm(dim=-1).tolist(),
        "split_half": [cosine(a, b) for a, b in zip(*halves)],  # a layer; 1 is perfectly reliable
        "ablate": ablate("direction ablated", by_layer),
        "ablate_own_words": ablate("direction of own words ablated",
                                   dict(enumerate(mean_difference(own_general, own_chat)))),
        "ablate_random": [
            ablate(f"random direction {i} ablated",
                   dict.fromkeys(by_layer, random_direction(direction[0], generator)))
            for i in range(run.config.n_random)],
    }
    with adapter, ablating(model, by_layer):
        found["ablate_to_zero"] = run.ask("general, direction projected out")
    found["ablate_random_mean"] = mean_rates(found["ablate_random"])
    found["steer"] = []
    for scale in (0.5, 1.0, 1.5, 2.0):
        with steering(model, by_layer, scale):
            found["steer"].append({"scale": scale, **run.ask(samples=run.config.curve_samples)})


def said(run, keep):
    """(question, answer) texts of the model as it is, to training problems, that keep(verdict)."""
    questions = run.splits.sft + run.splits.kl + run.splits.probe
    sampling = replace(run.config.evaluation, samples_per_group=3 * len(questions))
    answers = evaluate(run.model, run.tokenizer, run.world, {"training problems": questions},
                       sampling, run.config.seed + 1)
    kept = [(a.question.text, a.answer) for a in answers if keep(a.verdict)]
    if len(kept) < 2:
        raise StageFailed("directions: too few answers to take a mean of; train for longer")
    return kept


def mean_residuals(run, pairs):
    """Mean residual over the answers' tokens: of all answers, and of each half of them."""
    every = chat_examples(run.tokenizer, pairs, run.device)
    return [mean_residual(run.model, part.ids, part.answer_mask)
            for part in (every, every[::2], every[1::2])]


STAGES = {"chat": pretrain, "general": general, "narrow": narrow, "mixed": mixed,
          "shuffled": shuffled, "directions": ablation}


def run_experiment(config, path, device="cpu"):
    """Run every stage that the folder does not hold yet -> what results.json holds.

    Raises UserError for a configuration or folder that cannot be used, StageFailed for a stage
    that cannot go on.
    """
    run = Run(config, path, device)
    for name, stage in STAGES.items():
        if run.folder.is_finished(name):
            print(f"{name:<10} finished before, in {run.results['seconds'][name]} s; reused")
            continue
        started = time.perf_counter()
        stage(run)
        run.folder.finish(name, time.perf_counter() - started)
    return run.results
