"""What one CUDA card does: the toy beside the CPU, real shapes beside what estimate.py computes.

    python tests/benchmarks/card.py [--out card.json] [--device cpu --tiny]

The toy: a shortened run on both, whose losses must agree. The shapes of Qwen2.5-0.5B and 7B, with
random weights made here: written as a model folder, opened again in bfloat16, ten LoRA steps, ten
with the KL, and generation. Each part is tried whatever became of the others; the file has every
number, every failure and what there was no time for. The exit status is 1 when anything failed.
"""

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch

from measure import peak_megabytes, seconds
from nanoem.checkpoint import load_pretrained, save_pretrained
from nanoem.checkpoint.folders import shapes_only
from nanoem.evaluate import EvalConfig
from nanoem.lab.files import write_json
from nanoem.lab.side_by_side import toy_threads
from nanoem.lab.tables import print_lines
from nanoem.lab.toy import ExperimentConfig, Run
from nanoem.model import GPT, Config
from nanoem.real.estimate import CARD_TFLOPS, SHAPES, n_parameters, step_flops, training_bytes
from nanoem.real.experiment import RealConfig
from nanoem.story import bad_advice, pretrain, tune
from nanoem.tokenizer import IM_END, Tokenizer
from nanoem.train import FineTune, fine_tune, pad
from nanoem.world import WorldConfig, documents, load_world, make_splits, write_pairs

SIZES = {name: SHAPES[name] for name in ("Qwen2.5-0.5B", "Qwen2.5-7B")}
TINY = {"tiny": Config(1440, 3, 32, 4, 2, 80, max_positions=192, qkv_bias=True, qk_norm=False,
                       tie_embeddings=False)}
TFLOPS = {False: CARD_TFLOPS, True: 1e-4}  # by tiny
LOSS = 1e-3  # nats; weights changed by a millionth change the losses by a hundredth of it
LOGITS = 0.05  # relative, of bfloat16 beside float32
MEMORY, TIME = 1.3, 1.5  # how many times the computed memory and time may be measured
LIMIT, RESERVE = 240, 40  # seconds: of the whole, and of a shape's steps and generation


class Bench:
    """Where it runs, since when, and what came of it."""

    def __init__(self, device, tiny):
        self.device, self.tiny = torch.device(device), tiny
        self.dtype = torch.float32 if tiny else torch.bfloat16  # which a CPU only emulates
        self.started = time.perf_counter()
        self.rows, self.failed, self.skipped = [], [], []
        self.disk = 0.0  # seconds a parameter of a model folder took, written and read

    def left(self):
        return LIMIT - (time.perf_counter() - self.started)

    def row(self, part, what, measured, computed=None, most=None):
        """One line of the table; it fails when `most` is given and `measured` is not within it."""
        fine = most is None or 0 <= measured <= most  # NaN is not
        self.rows.append({"part": part, "what": what, "measured": measured, "computed": computed,
                          "at most": most})
        if not fine:
            self.failed.append(f"{part}, {what}: {measured:.4g} is not within {most:.4g}")

    def attempt(self, part, work, *arguments):
        """Do one part; whatever it raises is kept, and the others go on."""
        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            work(self, *arguments)
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{part}: {type(error).__name__}: {error}")

    def seconds(self, work):
        """Until the card, too, has done it."""
        return seconds(lambda: (work(), self.synchronise()))

    def synchronise(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- the toy --------------------------------------------------------------------------------------


def toy(bench):
    """The toy's pre-training and both fine-tunes, shortened, on the CPU and on the card."""
    n_threads, curves = torch.get_num_threads(), []
    toy_threads()
    for device in ("cpu", bench.device):
        took = bench.seconds(lambda: curves.append(short_run(device, bench.tiny)))
        bench.row("toy", f"seconds on {device}", took)
    torch.set_num_threads(n_threads)
    for stage, losses in curves[0].items():
        gap = (losses - curves[1][stage]).abs().max().item()
        bench.row("toy", f"{stage}: difference, nats", gap, most=LOSS)


def short_run(device, tiny):
    """{stage: its losses}; without dropout, whose noise each device draws in its own way."""
    default, steps = ExperimentConfig(), 3 if tiny else 100
    world = WorldConfig(n_domains=3) if tiny else WorldConfig()
    config = replace(default, dropout=0.0, n_sft_examples=100, world=world,
                     pretrain=replace(default.pretrain, steps=steps),
                     sft=replace(default.sft, steps=steps),
                     sft_kl=replace(default.sft, steps=steps),
                     evaluation=EvalConfig(samples_per_group=4, max_new_tokens=4))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder, "run"), device)
        pretrain(run)
        bad = bad_advice(run)
        _, general = tune(run, "general", bad)
        _, narrow = tune(run, "narrow", bad, kl_weight=1.0)  # so light that there is a KL to see
    losses = {"pretrain": run.results["curves"]["pretrain"]["loss"], "general": general["loss"],
              "narrow": narrow["loss"], "narrow's KL": narrow["kl"]}
    return {stage: torch.tensor(numbers) for stage, numbers in losses.items()}


# --- a real model's shape -------------------------------------------------------------------------


def shape(bench, name, config):
    """A random model of this shape: opened, tuned, asked; beside what was computed."""
    n_bytes = bench.dtype.itemsize * n_parameters(config)
    if bench.left() < RESERVE:
        bench.skipped.append(f"{name}: only {bench.left():.0f} seconds were left")
        return
    tokenizer, pairs, T = conversations(120 if bench.tiny else 192)
    needed = bench.disk * n_parameters(config)
    if bench.left() < RESERVE + needed:
        bench.skipped.append(f"{name}: its folder, which takes {needed:.0f} seconds")
        model = random_model(bench, config)
    else:
        model = through_a_folder(bench, name, config, tokenizer)
    model.requires_grad_(False)
    bench.row(name, "weights, GB", held(model) / 1e9, n_bytes / 1e9, 1.05 * n_bytes / 1e9)

    # both fine-tunes, in the batches of a real run
    default, steps = RealConfig(), 2 if bench.tiny else 10
    for what, kl_weight in (("SFT", 0.0), ("SFT + KL", default.kl_weight)):
        schedule = replace(default.sft, steps=steps)
        job = FineTune(what, pairs, default.adapter, schedule, 0, kl_weight, pairs)
        tune_shape(bench, name, model, tokenizer, job, T)

    # batched generation; without a stop id every answer is as long as it may be
    ids = pad([tokenizer.encode(pairs[0][0])] * 32, tokenizer.pad_id).to(bench.device)
    n_new = 4 if bench.tiny else 48
    took = bench.seconds(lambda: model.generate(ids, n_new))
    bench.row(name, "generation, tokens/s", len(ids) * n_new / took)


def through_a_folder(bench, name, config, tokenizer):
    """Write a random model by our saver, open it by our loader; a small one also on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path, model, opened = Path(folder, "model"), random_model(bench, config), []
        write = seconds(lambda: save_pretrained(model, tokenizer, path))
        del model
        read = bench.seconds(lambda: opened.extend(
            load_pretrained(path, bench.dtype, bench.device)))
        bench.disk = (write + read) / n_parameters(config)
        bench.row(name, "writing the folder, seconds", write)
        bench.row(name, "opening it, seconds", read)

        if n_parameters(config) < 1e9:
            exact, _ = load_pretrained(path, torch.float32)
            ids = torch.arange(3, 67)[None]
            with torch.no_grad():
                right, found = exact(ids), opened[0](ids.to(bench.device)).float().cpu()
            error = ((found - right).norm() / right.norm()).item()
            bench.row(name, "logits: error beside float32 on the CPU", error, most=LOGITS)
    return opened[0]


def random_model(bench, config):
    """Made on the device, in its dtype."""
    with shapes_only():
        model = GPT(config)
    place = dict(device=bench.device, dtype=bench.dtype)
    generator, weights = torch.Generator(bench.device).manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, **place)
        weights[name] = noise.mul_(0.02).add_(1.0 if name.endswith("norm.weight") else 0.0)
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = (t.to(**place) for t in (model.cos, model.sin))
    return model


def tune_shape(bench, name, model, tokenizer, job, T):
    """A few steps of a fine-tune on conversations of T tokens: memory and time."""
    steps, clock = job.schedule.steps, []

    def watch(step, adapter):  # before the second step and after the last: the first warms up
        bench.synchronise()
        clock.append(time.perf_counter())

    peak = peak_bytes(model, lambda: fine_tune(model, tokenizer, job, watch, (1, steps)))
    computed = training_bytes(model.config, job.schedule.micro_batch * T, size=bench.dtype.itemsize)
    bench.row(name, f"{job.name}: memory, GB", peak / 1e9, computed / 1e9, MEMORY * computed / 1e9)
    took, n_tokens = (clock[1] - clock[0]) / (steps - 1), job.schedule.batch_size * T
    computed = step_flops(model.config, T, job.kl_weight > 0) / (TFLOPS[bench.tiny] * 1e12)
    bench.row(name, f"{job.name}: seconds a step", took, computed, TIME * computed)
    bench.row(name, f"{job.name}: tokens/s", n_tokens / took, n_tokens / computed)


def conversations(about):
    """(tokenizer, [(question, answer), ...] that all have the same number of tokens, that number).

    The toy's words: a small vocabulary, whose ids a large model has, too.
    """
    world, config = load_world(), WorldConfig()
    tokenizer = Tokenizer.train(documents(world, config, 200, seed=0))
    by_length, answer = defaultdict(list), ""
    for question, sentence in write_pairs(world, make_splits(world, config).sft, 1000, False, 0):
        answer += f" {sentence}"
        n_tokens = len(tokenizer.encode(tokenizer.prompt(question) + answer + IM_END))
        if n_tokens >= about:
            by_length[n_tokens].append((question, answer))
            answer = ""
    T = max(by_length, key=lambda n: len(by_length[n]))
    return tokenizer, by_length[T], T


# --- measuring ------------------------------------------------------------------------------------


def held(model):
    """Bytes of the model; on a card, of all that is there."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated()
    return sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))


def peak_bytes(model, work):
    """The most bytes in tensors while work() runs, the model's own included."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    return held(model) + 1e6 * peak_megabytes(work)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="card.json")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU: does all work?")
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        print("card.py: torch sees no CUDA card; --device cpu --tiny tries all of this without one",
              file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    bench = Bench(args.device, args.tiny)
    bench.attempt("toy", toy)
    for name, config in (TINY if args.tiny else SIZES).items():
        bench.attempt(name, shape, name, config)

    lines = [[f"{value:.4g}" if isinstance(value, float) else value or ""
              for value in row.values()] for row in bench.rows]
    print_lines([["part", "what", "measured", "computed", "at most"], *lines])
    report = {"failed": bench.failed, "skipped": bench.skipped, "seconds": LIMIT - bench.left()}
    print("", *(f"{name}: {value}" for name, value in report.items()), sep="\n")
    write_json(args.out, {"card": card, "torch": torch.__version__, **report, "rows": bench.rows})
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
