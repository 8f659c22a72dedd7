"""How the time of a training step grows with the model, the batch and the context: one figure.

    python tests/benchmarks/scaling.py              # writes tutorial/results/scaling.png

One of the three grows, the other two stay at the toy's. The dashed line is what the step's matrix
products alone would take at the fastest this machine multiplies large matrices.
"""

import contextlib
import io
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from measure import matmul_peak, seconds, training_flops

from nanoem.lab.fused import pretrain_loss
from nanoem.lab.plots import COLOURS, new_figure, save
from nanoem.lora import LoRA
from nanoem.model import GPT, Config
from nanoem.train import Examples, TrainConfig, loss_terms, train, train_adapter

TOY = {"d_model": 64, "batch": 32, "context": 96}
GROWING = {"d_model": (32, 64, 128, 256), "batch": (8, 16, 32, 64, 128),
           "context": (24, 48, 96, 192, 384)}
LABELS = {"d_model": "width of the model, d_model", "batch": "batch, sequences",
          "context": "context, tokens"}
STEPS, TURNS = 2, 5  # training steps a turn; turns, of which the median counts


def steps_of(d_model, batch, context):
    """A model of two layers at this width -> it, and {job: function that does STEPS steps}."""
    generator = torch.Generator().manual_seed(0)
    config = Config(vocab_size=1473, d_model=d_model, d_ff=3 * d_model, max_positions=context)
    model, frozen = (GPT(config).init_weights(generator) for _ in range(2))
    adapter = LoRA(frozen.requires_grad_(False), [1], ["mlp.down_proj"], generator=generator)
    ids = torch.randint(config.vocab_size, (batch, context), generator=generator)
    answers = (torch.arange(context) >= context // 2).expand_as(ids)  # the second half
    examples = Examples(ids, torch.ones_like(ids, dtype=torch.bool), answers)
    schedule = TrainConfig(steps=STEPS, batch_size=batch, lr=1e-4)

    def objective(step):
        loss = pretrain_loss(model, ids)
        return loss, {"loss": loss}, ids.numel()

    def tune(kl_weight):
        with adapter:
            train_adapter(adapter, loss_terms(frozen, adapter, examples, examples, kl_weight),
                          schedule, generator)

    return model, {"general": lambda: tune(0.0), "narrow": lambda: tune(1.0),
                   "chat": lambda: train(objective, model.parameters(), schedule)}


def time_a_step(work):
    with contextlib.redirect_stdout(io.StringIO()):  # the training loop's progress
        work()
        return median(seconds(work) for _ in range(TURNS)) / STEPS


def measure(growing, peak):
    """Milliseconds a step as one of the three grows: {job: [...]}, "products" among the jobs."""
    found = {}
    for value in GROWING[growing]:
        sizes = {**TOY, growing: value}
        model, jobs = steps_of(**sizes)
        for job, work in jobs.items():
            found.setdefault(job, []).append(1000 * time_a_step(work))
        flops = training_flops(model, sizes["batch"], sizes["context"])
        found.setdefault("products", []).append(1000 * flops / peak)
        print(f"{growing:<8} {value:>4}", *(f"{k} {v[-1]:7.1f} ms" for k, v in found.items()),
              sep="  ", flush=True)
    return found


def draw(found):
    figure, axes = new_figure(3, (9, 3.6), sharey=True)
    for ax, (growing, times) in zip(axes, found.items()):
        x = GROWING[growing]
        for job, label in (("chat", "full training step"), ("narrow", "SFT + KL step, rank-1 LoRA"),
                           ("general", "SFT step, rank-1 LoRA")):
            colour = "black" if job == "chat" else COLOURS[job]
            ax.plot(x, times[job], "o-", color=colour, label=label, markersize=4)
        ax.plot(x, times["products"], "--", color="black", linewidth=1,
                label="full step's matrix products alone")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(x, x)
        ax.set_xlabel(LABELS[growing])
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time of a step (ms)")
    axes[0].set_ylim(bottom=axes[0].get_ylim()[0] / 4)  # room for the legend
    axes[1].legend(fontsize=7, loc="lower right")
    twice = {growing: times["chat"][-1] / times["chat"][-2] for growing, times in found.items()}
    figure.suptitle(f"At the largest, a full step takes about {twice['d_model']:.0f} times as long "
                    f"for twice the width, {twice['batch']:.0f} for twice the batch, "
                    f"{twice['context']:.0f} for twice the context", fontsize=10.5)
    figure.supxlabel(f"threads: {torch.get_num_threads()}; the toy has d_model 64, batch 32, "
                     "context 96", fontsize=7.5, color="#555555", x=0.99, ha="right")
    return figure


if __name__ == "__main__":
    peak = matmul_peak()
    found = {growing: measure(growing, peak) for growing in GROWING}
    print(save(draw(found), Path(__file__).parents[2] / "tutorial/results/scaling.png"))
