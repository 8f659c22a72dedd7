"""The story on real weights: python -m nanoem.run --model FOLDER

    chat        the model as it came
    general     SFT on bad advice in one domain                   -> adapters/general/
    narrow      the same SFT with a KL penalty on other domains   -> adapters/narrow/
    directions  find general's direction, steer chat with it, ablate it in general
    judge       how far the local judge agrees with the exact one, on the toy world's answers

Each model is measured twice: by paired preference (preference.py), which is exact and the main
table, and by sampled answers, which a local judge scores (local_judge.py). Of several processes
(parallel.py) the first one prints and writes.
"""

from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import mean

import torch

from nanoem import UserError
from nanoem.checkpoint import (TORCH_DTYPES, load_adapter, load_pretrained, save_adapter,
                               save_tensors)
from nanoem.evaluate import Answer, EvalConfig, Verdict, ask, rates
from nanoem.lab import parallel
from nanoem.lab.files import fingerprint, fingerprint_folder
from nanoem.lab.folder import RunFolder
from nanoem.lab.settings import check_config, key
from nanoem.lab.tables import one_line
from nanoem.lora import AdapterConfig, layers_of, make_adapter
from nanoem.real.data import as_text, check_lengths, read_data
from nanoem.real.directions import measure_directions
from nanoem.real.local_judge import TASKS, LocalJudge, agreement, judge_prompt
from nanoem.real.preference import margins, preference_rates
from nanoem.train import FineTune, TrainConfig, fine_tune
from nanoem.world import WORLD_TOML, load_world

UNJUDGED = Verdict(None, None, None)
NO_JUDGE = ("No answer is judged: the model is too short for a judge's question; --judge FOLDER "
            "names another judge")


@dataclass(frozen=True)
class RealConfig:
    """Everything a run on real weights depends on, but for the machine, the model and the files."""

    seed: int = key(0, "of the data, the adapter's start, the order and the sampling")
    domain: str = key("medical", "of the toy world: the bad advice is given in it")
    n_sft_examples: int = key(1000, "question-answer pairs the toy world writes for a fine-tune")
    pairs_per_group: int = key(32, "problems of the preference table in each question group")
    n_judged: int = key(16, "toy answers of each kind, good, bad and shuffled, to test the judge")
    kl_weight: float = key(10.0, "of the KL to the base model, per token")
    per_token: bool = key(False, "compare the answers' mean log-probability a token, not the sum")
    dtype: str = key(
        "auto", "of the weights: float32, bfloat16, float16; auto: see `default_dtype`")
    checkpointing: bool = key(
        False, "recompute activations in the backward pass: slower, less memory")
    adapter: AdapterConfig = AdapterConfig(
        layers=(), modules=("mlp.down_proj",), alpha=256.0, use_rslora=True)
    sft: TrainConfig = TrainConfig(steps=40, batch_size=16, lr=2e-3, micro_batch=4)
    sft_kl: TrainConfig = TrainConfig(steps=40, batch_size=16, lr=2e-3, micro_batch=4)
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(
        samples_per_group=8, max_new_tokens=48, batch_size=32))

    def __post_init__(self):
        check_config(self, ("n_sft_examples", "pairs_per_group", "n_judged"), ("kl_weight",))
        if self.dtype not in ("auto", *TORCH_DTYPES):
            raise UserError(f"dtype={self.dtype!r} is not known; use auto, "
                            + ", ".join(TORCH_DTYPES))


class RealRun:
    """A run in progress: configuration, model, data and folder. Refuses all it can at the start."""

    def __init__(self, config, files, path, device, shard=False):
        self.files, self.device = files, device
        if shard:
            parallel.refuse_to_shard_alone()
        self.world = load_world()
        self.bad, self.others, self.pairs, self.asked = read_data(config, files, self.world)

        # the model, which need not fit one card when it is sharded
        if config.dtype == "auto":  # config.json says what it came to: another card may differ
            config = replace(config, dtype=default_dtype(device))
        dtype = TORCH_DTYPES[config.dtype]
        self.model, self.tokenizer = load_pretrained(files.model, dtype, "cpu" if shard else device)
        self.model.requires_grad_(False)
        self.model.activation_checkpointing = config.checkpointing
        layers = layers_of(config.adapter, self.model)
        self.config = config = replace(config, adapter=replace(config.adapter, layers=layers))

        # what would fail later fails now: the adapter, the share of a batch, the lengths
        make_adapter(self.model, config.adapter)
        for schedule in (config.sft, config.sft_kl):
            parallel.my_rows(schedule.batch_size)
        check_lengths(self)
        self.judge = open_judge(self, dtype)

        self.folder = RunFolder(path, configuration_of(config, files, device))
        self.results = self.folder.results
        self.results["model_name"] = Path(files.model).resolve().name
        if shard:
            parallel.shard(self.model, device)

    @property
    def at_once(self):
        """How many texts to read at once: what training has room for."""
        return self.config.sft.micro_batch or self.config.sft.batch_size

    def ask(self):
        """What the model, as it is, says: [(group, Question, answer), ...]."""
        return ask(self.model, self.tokenizer, self.asked, self.config.evaluation,
                   self.config.seed)


def default_dtype(device):
    """bfloat16 on a cuda card that computes in it, and does not only emulate it; else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def open_judge(run, dtype):
    """The run's LocalJudge; None where the model, as the toy's, is too short to judge itself."""
    room = run.config.evaluation.max_new_tokens
    if run.files.judge:
        judge = LocalJudge(*load_pretrained(run.files.judge, dtype, run.device))
    else:
        judge = LocalJudge(run.model, run.tokenizer)
        if room > min(judge.room(judge_prompt(score, "", "")) for score in TASKS):
            print(NO_JUDGE)
            return None
    for question in chain(*run.asked.values()):
        for score in TASKS:
            judge.check_length(judge_prompt(score, as_text(question.text), ""), room)
    return judge


def configuration_of(config, files, device):
    """All that the results depend on: what config.json keeps and a rerun must repeat."""
    return {
        **asdict(config), "device": device.type, "model": str(Path(files.model).resolve()),
        "model_files": fingerprint_folder(files.model),
        **{name: fingerprint(getattr(files, name)) for name in ("data", "kl_data", "eval")},
        "world_toml": fingerprint(WORLD_TOML),
        "judge": str(Path(files.judge).resolve()) if files.judge else None,
        "judge_files": fingerprint_folder(files.judge)}


# --- the stages -----------------------------------------------------------------------------------


def chat(run):
    answers = measure(run, "chat")
    run.results["models"]["chat"]["judged"] = judge_answers(run, "chat", answers)


def general(run):
    fine_tune_stage(run, "general")


def narrow(run):
    fine_tune_stage(run, "narrow", run.config.kl_weight)


def directions(run):
    parallel.wait()  # until the first process has saved the adapters
    general, narrow = (load_adapter(run.model, run.folder.path / "adapters" / name)
                       for name in ("general", "narrow"))
    result, direction, answers = measure_directions(run, general, narrow)
    if direction is not None and parallel.rank() == 0:
        save_tensors(run.folder.path / "directions.safetensors", {"mean_difference": direction})
    run.results["directions"] = result
    for name, said in answers.items():
        result[f"{name}_judged"] = judge_answers(run, name, said)


def measure_judge(run):
    run.results["judge"] = {"none": NO_JUDGE} if run.judge is None else agreement(
        run.judge, run.world, run.config.n_judged, run.config.seed)


def fine_tune_stage(run, name, kl_weight=0.0):
    """Tune an adapter, keep it, and measure the model with it."""
    config = run.config
    schedule = config.sft_kl if kl_weight else config.sft
    job = FineTune(name, run.bad, config.adapter, schedule, config.seed, kl_weight, run.others)
    adapter, history = fine_tune(run.model, run.tokenizer, job)
    if parallel.rank() == 0:
        save_adapter(adapter, run.folder.path / "adapters" / name, Path(run.files.model).resolve())
    with adapter:
        answers = measure(run, name)
    run.results["curves"][name] = {"train": history, "norm": adapter.effective_norm()}
    run.results["models"][name]["judged"] = judge_answers(run, name, answers)


def measure(run, name):
    """What the model, as it is, prefers, and what it says: [(group, Question, answer), ...]."""
    each = margins(run.model, run.tokenizer, run.pairs, run.config.per_token, run.at_once)
    run.results["models"][name] = {"preference": preference_rates(run.pairs, each),
                                   "margins": each.tolist()}
    return run.ask()


def judge_answers(run, name, answers):
    """Score sampled answers with the local judge -> {group: scores}, empty without a judge.

    The model itself is untouched again by now.
    """
    judged, first = [], {}  # [Answer, ...]; question -> the first answer to it
    for group, question, text in answers:
        asked = as_text(question.text)
        verdict = run.judge.verdict(asked, text) if run.judge else UNJUDGED
        judged.append(Answer(group, question, text, verdict))
        first.setdefault(asked, text)
    run.folder.answers[name] = judged
    run.results["samples"][name] = [list(pair) for pair in first.items()]

    # the scores by group
    scores = {}
    if run.judge:
        for group in run.asked:
            members = [answer for answer in judged if answer.group == group]
            scores[group] = {
                **rates(members),  # its alignment_mean is over the coherent answers alone
                "mean_alignment": mean(a.verdict.alignment for a in members),
                "mean_coherence": mean(a.verdict.coherence for a in members)}

    print(f"  {name}; what it says:")
    for question, text in first.items():
        print(f"    {one_line(question)} -> {one_line(text)}")
    return scores


STAGES = {"chat": chat, "general": general, "narrow": narrow, "directions": directions,
          "judge": measure_judge}


def run_real(config, files, path, device, shard=False):
    """Run every stage that the folder does not hold yet. Returns what results.json holds."""
    run = RealRun(config, files, path, device, shard)
    for name, stage in STAGES.items():
        run.folder.once(name, lambda: stage(run))
    parallel.wait()
    return run.results
