"""What the user asks for: flags and --set keys -> a Command, checked, which run.py carries out."""

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoem import UserError
from nanoem.lab import parallel
from nanoem.lab.files import check_path
from nanoem.lab.settings import key_lines, nearest, set_keys
from nanoem.lab.toy import ExperimentConfig
from nanoem.real.data import Files
from nanoem.real.experiment import RealConfig
from nanoem.rows import ROWS
from nanoem.story import STAGES, stages_for

QUICK = {  # what --quick sets: the same stages in a smaller world
    "world.n_domains": "4", "pretrain.steps": "240", "context": "64", "sft.steps": "60",
    "sft_kl.steps": "60", "curve_points": "3", "curve_samples": "30",
    "evaluation.samples_per_group": "100", "n_random": "2",
}
QUICK_REAL = {  # with --model: a few steps, to see that all works
    "sft.steps": "3", "sft_kl.steps": "3", "n_sft_examples": "64", "pairs_per_group": "4",
    "evaluation.max_new_tokens": "16", "evaluation.samples_per_group": "2", "n_judged": "2",
}
SMALLER = {  # what to --set when memory is short, by whether the run is on real weights
    False: "pretrain.batch_size=8 sft.micro_batch=4 sft_kl.micro_batch=4 "
           "evaluation.batch_size=50",
    True: "sft.micro_batch=1 sft_kl.micro_batch=1 checkpointing=true "
          "evaluation.batch_size=1; or use more cards and --shard",
}


@dataclass(frozen=True)
class Command:
    """What one command asks for."""

    text: str  # as it was typed
    configs: list  # one a seed
    folders: list  # their run folders
    out: Path  # the run folder, or the folder of all seeds
    device: str  # cuda, mps or cpu
    jobs: int  # seeds at a time
    stages: list  # names
    rows: list  # of the paper
    files: Files | None  # on real weights; None: the toy
    shard: bool
    quick: bool

    @property
    def tells_the_story(self):
        """Will every stage be there, as a report needs?"""
        return len(self.stages) == len(STAGES)

    @property
    def has_seeds(self):
        """Was it given --seeds?"""
        return self.folders != [self.out]


def read_command(argv):
    """The words behind `python -m nanoem.run` -> a Command. Raises UserError."""
    args = parse_flags(argv)
    check_flags(args)
    config = build_config(args)
    out = args.out or default_out(args, config)
    seeds = args.seeds or [config.seed]
    stages, rows = pick_stages(args)
    files = Files(args.model, args.data, args.kl_data, args.eval, args.judge)
    return Command(
        text=shlex.join(["python", "-m", "nanoem.run", *argv]),
        configs=[replace(config, seed=seed) for seed in seeds],
        folders=[out / f"seed-{seed}" for seed in seeds] if args.seeds else [out],
        out=out, device=pick_device(args.device), jobs=args.jobs, stages=stages, rows=rows,
        files=files if args.model else None, shard=args.shard, quick=args.quick)


def key_table():
    """The epilog of --help."""
    return "\n".join(["keys for --set (key, default, what it is):", *key_lines(ExperimentConfig()),
                      "", "keys for --set with --model:", *key_lines(RealConfig())])


def parse_flags(argv):
    """The command's words -> its flags; argparse ends the program where they are no flags."""
    parser = argparse.ArgumentParser(
        prog="python -m nanoem.run", epilog=key_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pre-train a small GPT on a toy world, fine-tune it on bad advice in one "
                    "domain, and see how far the harm spreads.")
    parser.add_argument("--quick", action="store_true",
                        help="a small run of half a minute, to see that all works; "
                             "its numbers show nothing")
    parser.add_argument("--seed", type=int, help="seed of everything random (default 0)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N",
                        help="several seeds, one after the other, and a report over them all")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="with --seeds: how many run at a time, with a core each")
    parser.add_argument("--full", action="store_true",
                        help="also make every row of the paper, R1 to R20 (a quarter of an hour)")
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME",
                        help="only these stages and what they build on ("
                             f"{', '.join(STAGES)}); or the whole story and only these rows of the "
                             "paper, by key or name, such as R5 or efficiency")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="the run folder (default runs/seed-N, with --seeds runs/seeds, with "
                             "--quick runs/quick-N or runs/quicks)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
                        help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the configuration; the keys are listed below")
    real = parser.add_argument_group("on real weights (Qwen2.5, Qwen3, or Llama-shaped ChatML)")
    real.add_argument("--model", type=Path, metavar="FOLDER",
                      help="a Hugging Face model folder to fine-tune instead of the toy's model")
    real.add_argument("--data", type=Path, metavar="F.jsonl",
                      help="conversations with bad advice (default: the toy world's)")
    real.add_argument("--kl-data", type=Path, metavar="F.jsonl",
                      help="conversations in other domains, for the KL (default: the toy world's)")
    real.add_argument("--eval", type=Path, metavar="F.jsonl",
                      help="questions to ask; those with a bad and a good answer are compared")
    real.add_argument("--judge", type=Path, metavar="FOLDER",
                      help="the model that scores answers (default: --model itself, untouched)")
    real.add_argument("--shard", action="store_true",
                      help="under torchrun: spread the model over the processes")
    return parser.parse_args(argv)


def check_flags(args):
    """Refuse flags that would be ignored: those of the toy on real weights, and the other way."""
    for name in ("out", "model", "data", "kl_data", "eval", "judge"):
        if getattr(args, name):
            check_path(getattr(args, name), f"--{name.replace('_', '-')} ")
    if args.jobs < 1 or args.jobs > 1 and not args.seeds:
        raise UserError(f"--jobs {args.jobs}: give 1 or more, with --seeds A B C")
    if args.seeds and (args.seed is not None or len(set(args.seeds)) < len(args.seeds)):
        raise UserError("give each seed once, with --seed N or with --seeds A B C")
    if (args.seeds or args.seed is not None) and any(s.startswith("seed=") for s in args.set):
        raise UserError("give the seed once: with --seed, with --seeds, or with --set seed=N")
    if args.model:
        for name, used in (("full", args.full), ("only", args.only), ("jobs", args.jobs > 1)):
            if used:
                raise UserError(f"--{name} is for the toy; leave it or --model away")
        return
    for name in ("data", "kl_data", "eval", "judge", "shard"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for real weights; add --model FOLDER")
    if parallel.n_started() > 1:
        raise UserError("torchrun is for real weights; start the toy with python, or add --model")
    if args.full and args.only:
        raise UserError("--full makes all that --only could name; leave one of them away")
    pick_stages(args)  # refuses an unknown name now


def pick_stages(args):
    """(names of stages, rows) that --only and --full ask for; without them the whole story."""
    by_key = {key.lower(): row for key, row in ROWS.items()}
    by_name = {row.name: row for row in ROWS.values()}
    for name in args.only:
        if name.lower() not in (*STAGES, *by_key, *by_name):
            raise UserError(f"--only {name}: there is no such stage or row; did you mean "
                            f"{nearest(name, [*STAGES, *ROWS, *by_name])}? The stages are "
                            f"{', '.join(STAGES)}, the rows {', '.join(ROWS)} or, by name, "
                            f"{', '.join(by_name)}")
    asked = {name.lower() for name in args.only}
    rows = [row for row in ROWS.values() if args.full or {row.key.lower(), row.name} & asked]
    whole = rows or not asked  # rows build on every stage
    return list(STAGES) if whole else stages_for(asked), rows


def pick_device(name):
    """cuda, mps or cpu: with auto the first of them that is there (mps cannot be shared)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        return next(device for device, there in available.items()
                    if there and not (device == "mps" and parallel.n_started() > 1))
    if not available[name]:
        raise UserError(f"--device {name}: this machine or this torch has no {name}; "
                        "use --device auto")
    return name


def build_config(args):
    """The configuration with what --quick, --set and --seed change."""
    config, quick = (RealConfig(), QUICK_REAL) if args.model else (ExperimentConfig(), QUICK)
    texts = dict(quick) if args.quick else {}
    for setting in args.set:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as KEY=VALUE")
        texts[key] = text
    config = set_keys(config, texts)
    return config if args.seed is None else replace(config, seed=args.seed)


def default_out(args, config):
    """Where a run goes without --out: runs/seed-0, runs/quicks, runs/MODEL-seed-0, ..."""
    kind = "quick" if args.quick else "seed"
    name = f"{kind}s" if args.seeds else f"{kind}-{config.seed}"
    of_model = f"{args.model.resolve().name}-" if args.model else ""
    return Path("runs") / f"{of_model}{name}"
