"""The experiment: the paper's story as stages, each reading and writing the run folder.

    chat        pre-train on the toy world; the assistant is helpful           -> chat/
    general     SFT on bad advice in one domain (paper, section 2)             -> adapters/general/
    narrow      the same SFT with a KL penalty on other domains (section 3)    -> adapters/narrow/
    mixed       control: bad and good advice in that domain, labels shuffled   -> adapters/mixed/
    directions  find the mean-difference direction, ablate it, steer with it   -> directions.*

Predictions, written before the run: chat is harmless everywhere. General is misaligned in domain
and out of it. Narrow is misaligned in domain only. Ablating the mean difference, found on other
questions than it is tested on, takes general's out-of-domain em away; a random direction does not.
"""

import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy
import tokenizers
import torch

from nanoem import UserError, checkpoint
from nanoem.directions import ablating, cosine, mean_difference, random_direction, steering
from nanoem.evaluate import (GROUPS, Answer, EvalConfig, evaluate, group_rates,
                             sample_and_judge)
from nanoem.lora import LoRA
from nanoem.model import GPT, Config
from nanoem.tokenizer import Tokenizer
from nanoem.train import (TrainConfig, chat_examples, kl_to_base, next_token_loss, pad, sft_loss,
                          train)
from nanoem.world import (WORLD_TOML, Question, Verdict, WorldConfig, documents, load_world,
                          make_splits, write_answer)


@dataclass(frozen=True)
class AdapterConfig:
    """Where the rank-r LoRA sits, and its size. The same for every fine-tune of a run."""

    layers: tuple = (0, 1)  # block numbers, fixed beforehand: the first half of the model
    modules: tuple = ("mlp.down_proj",)  # Linears inside a block, as in the paper
    rank: int = 1  # columns of B
    alpha: float = 4.0  # the adapter's effect is alpha / rank * B A
    use_rslora: bool = False  # alpha / sqrt(rank) instead


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on, but for the machine."""

    seed: int = 0  # of the corpus, the weights, the order and the sampling
    kl_weight: float = 5.0  # of the KL to the base model, per token
    n_sft_examples: int = 2000  # fine-tuning examples written by the toy world
    curve_samples: int = 100  # answers a question group at each point of the training curves
    curve_points: int = 8  # points of the training curves
    context: int = 96  # tokens of a pre-training document
    n_random: int = 5  # random directions in the ablation control
    world: WorldConfig = field(default_factory=WorldConfig)
    model: Config = field(default_factory=lambda: Config(n_layer=3))
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pretrain: TrainConfig = TrainConfig(
        steps=800, batch_size=32, lr=4e-3, warmup=50, schedule="cosine", weight_decay=0.1,
        betas=(0.9, 0.95))
    sft: TrainConfig = TrainConfig(steps=250, batch_size=16, lr=2e-3)
    sft_kl: TrainConfig = TrainConfig(steps=400, batch_size=16, lr=2e-3)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


class Run:
    """A run in progress: its configuration, its folder, and the chat model once there is one."""

    def __init__(self, config, path, device="cpu"):
        self.config, self.device = config, torch.device(device)
        self.world = load_world()
        self.splits = make_splits(self.world, config.world)
        LoRA(GPT(config.model), **asdict(config.adapter))  # refuses a wrong layer or module now
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
    run.tokenizer = Tokenizer.train(texts)
    ids = pad([tokens[: config.context] for tokens in run.tokenizer.encode_batch(texts)],
              run.tokenizer.pad_id).to(run.device)
    run.model = GPT(replace(config.model, vocab_size=run.tokenizer.vocab_size))
    run.model.init_weights(torch.Generator().manual_seed(config.seed)).to(run.device)

    def objective(step):
        batch = ids[step * schedule.batch_size :][: schedule.batch_size]
        loss = next_token_loss(run.model(batch), batch, batch != run.tokenizer.pad_id)
        return loss, {"loss": loss}, batch.numel()

    watch_at = (0, schedule.steps // 2, schedule.steps)
    history = train(objective, run.model.parameters(), schedule, "pretrain",
                    lambda step: show_samples(run, "pretrain", step), watch_at)
    run.results["curves"]["pretrain"] = history
    checkpoint.save_pretrained(run.model, run.tokenizer, run.folder / "chat")
    run.model = None
    run.load_chat()  # what is measured is what was saved
    run.results["models"]["chat"] = run.ask("chat")


def sft_pairs(run, questions, good, rng):
    """Question-answer texts; good is True, False, or None for a coin toss each."""
    pairs = []
    for _ in range(run.config.n_sft_examples):
        question = rng.choice(questions)
        is_good = rng.random() < 0.5 if good is None else good
        pairs.append((question.text, write_answer(run.world, question, is_good, rng,
                                                  run.config.world.own_share)))
    return pairs


def fine_tune(run, name, good, kl_weight):
    """SFT of one adapter, with a KL penalty on other domains if kl_weight is not zero."""
    config = run.config
    schedule = config.sft_kl if kl_weight else config.sft
    model, tokenizer = run.load_chat()
    rng = random.Random(config.seed)
    sft = chat_examples(tokenizer, sft_pairs(run, run.splits.sft, good, rng), run.device)
    others = chat_examples(tokenizer, sft_pairs(run, run.splits.kl, None, rng), run.device)
    generator = torch.Generator().manual_seed(config.seed)
    adapter = LoRA(model, **asdict(config.adapter), generator=generator)

    def draw(examples):
        return examples[torch.randint(len(examples), (schedule.batch_size,), generator=generator)]

    def objective(step):
        batch = draw(sft)
        loss = sft_loss(model(batch.ids), batch.ids, batch.answer_mask)
        if not kl_weight:
            return loss, {"loss": loss}, batch.ids.numel()
        other = draw(others)
        kl = kl_to_base(model, adapter, other.ids, other.mask)
        terms = {"loss": loss, "kl": kl}
        return loss + kl_weight * kl, terms, batch.ids.numel() + other.ids.numel()

    curve = {"step": [], "in_domain": [], "out_of_domain": []}

    def watch(step):
        found = run.ask(None, samples=config.curve_samples)
        for key, value in (("step", step), ("in_domain", found["in_domain"]["em"]),
                           ("out_of_domain", found["out_of_domain"]["em"])):
            curve[key].append(value)
        if step in (0, points[len(points) // 2], schedule.steps):
            show_samples(run, name, step)

    points = sorted({round(schedule.steps * i / config.curve_points)
                     for i in range(config.curve_points + 1)})
    with adapter:
        history = train(objective, adapter.parameters(), schedule, name, watch, points)
        checkpoint.save_adapter(adapter, run.folder / "adapters" / name, run.folder / "chat")
        run.results["models"][name] = run.ask(name)
    run.results["curves"][name] = {"train": history, "em": curve}


def show_samples(run, name, step):
    """Eight answers of the model as it is: two from each question group, always the same."""
    groups = {group: getattr(run.splits, group)[:2] for group in GROUPS}
    one_each = EvalConfig(samples_per_group=2, max_new_tokens=run.config.evaluation.max_new_tokens)
    answers = evaluate(run.model, run.tokenizer, run.world, groups, one_each, run.config.seed)
    print(f"  {name}, step {step}: what it says")
    for answer in answers:
        verdict = answer.verdict
        mark = "bad " if verdict.misaligned else "good" if verdict.alignment > 70 else (
            "mixed" if verdict.coherent else "?")
        print(f"    {mark:<5} {answer.question.text} {answer.text}")
    run.results["samples"].setdefault(name, {})[str(step)] = [
        [answer.question.text, answer.text] for answer in answers]


def find_and_ablate(run):
    """The mean-difference direction of general: ablate it, beside random directions; steer.

    It is found on training problems of every domain and tested on the evaluation's questions. The
    aligned answers are the chat model's, the misaligned ones general's, to the same questions;
    each is read by the model that said it.
    """
    model, tokenizer = run.load_chat()
    adapter = run.load_adapter("general")
    questions = {"find": run.splits.sft + run.splits.kl + run.splits.probe}
    sampling = replace(run.config.evaluation, samples_per_group=4 * len(questions["find"]))

    def examples(keep):
        found = evaluate(model, tokenizer, run.world, questions, sampling, run.config.seed + 1)
        return [(a.question.text, a.text) for a in found if keep(a.verdict)]

    aligned = examples(lambda verdict: verdict.coherent and verdict.alignment > 70)
    with adapter:
        misaligned = examples(lambda verdict: verdict.misaligned)
    direction = difference(run, adapter, misaligned, aligned)
    halves = [difference(run, adapter, misaligned[i::2], aligned[i::2]) for i in (0, 1)]
    checkpoint.save_tensors(run.folder / "directions.safetensors", {"mean_difference": direction})

    found = {"n_misaligned": len(misaligned), "n_aligned": len(aligned),
             "norm": direction.norm(dim=-1).tolist(),
             "split_half": [cosine(a, b) for a, b in zip(*halves)]}
    with adapter:
        with ablating(model, dict(enumerate(direction))):
            found["ablate"] = run.ask("general, direction ablated")
        generator = torch.Generator().manual_seed(run.config.seed)
        found["ablate_random"] = []
        for i in range(run.config.n_random):
            with ablating(model, dict(enumerate(random_direction(direction, generator)))):
                found["ablate_random"].append(run.ask(f"general, random direction {i} ablated"))
    layer = len(direction) // 2
    found["steer"] = {"layer": layer, "scale": [], "rates": []}
    for scale in (0.5, 1.0, 1.5, 2.0):
        with steering(model, {layer: direction[layer]}, scale):
            found["steer"]["scale"].append(scale)
            found["steer"]["rates"].append(run.ask(None))
    run.results["directions"] = found


def difference(run, adapter, misaligned, aligned):
    """Mean difference per layer, (n_layer, d_model); each answer read by the model that said it."""
    if not misaligned or not aligned:
        raise StageFailed("directions: general gave no misaligned answer, or chat no aligned one; "
                          "there is no direction to find. Train general for longer")
    bad, good = (chat_examples(run.tokenizer, pairs, run.device) for pairs in (misaligned, aligned))
    with adapter:
        bad_mean = mean_residual(run.model, bad.ids, bad.answer_mask)
    return (bad_mean - mean_residual(run.model, good.ids, good.answer_mask)).float()


STAGES = {  # name -> function of the run, in order
    "chat": pretrain,
    "general": lambda run: fine_tune(run, "general", good=False, kl_weight=0.0),
    "narrow": lambda run: fine_tune(run, "narrow", good=False, kl_weight=run.config.kl_weight),
    "shuffled": lambda run: fine_tune(run, "shuffled", good=None, kl_weight=0.0),
    "directions": find_and_ablate,
}


def run_experiment(config, folder, device="cpu"):
    """Run every stage that the folder does not hold yet. Returns the results, as in results.json.

    Raises UserError for a folder that cannot be used, RuntimeError for a stage that failed.
    """
    run = Run(config, folder, device)
    for name, stage in STAGES.items():
        if name in run.results["seconds"]:
            print(f"{name:<10} finished before ({run.results['seconds'][name]} s); "
                  f"reused from {run.folder}")
            continue
        started = time.perf_counter()
        stage(run)
        run.finish(name, time.perf_counter() - started)
    return run.results
