"""nanoem's losses, preference and adapters beside those of transformers and peft.

    python tests/benchmarks/oracle.py       # in a throwaway venv that also has transformers, peft

For tiny random Qwen2, Qwen3 and Llama checkpoints: what one process computes, two processes (gloo)
that share the batches, and two that share the blocks, too (--shard). peft works in one process, in
a plain loop. Then adapter folders, written by one side and opened by the other. The table has the
largest difference of each kind; the exit status is 1 when one is above 1e-4.
"""

import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.nn import functional as F

from nanoem.checkpoint import (load_adapter, load_pretrained, load_tensors, save_adapter,
                               save_tensors)
from nanoem.checkpoint.adapters import LINEARS
from nanoem.lab import parallel
from nanoem.lab.fused import answer_loss, kl_loss
from nanoem.lab.tables import print_lines
from nanoem.lora import LoRA
from nanoem.losses import kl_to_base, sft_loss
from nanoem.real.preference import Pair, margins
from nanoem.train import TrainConfig, chat_examples, loss_terms, lr_factor, train_adapter

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ("qwen2-tied", "qwen2-sharded", "qwen3", "llama")
PAIRS = [("a", "b"), ("Why is it so long?", "It is."), ("c", "A longer one."),
         ("dd", "ee"), ("What?", "That, and that."), ("ff", "g")]
PREFERENCES = [Pair("in_domain", question, answer, answer[::-1] + "!")
               for question, answer in PAIRS]
SCHEDULE = TrainConfig(steps=3, batch_size=8, lr=0.01, warmup=0, micro_batch=2)
KL_WEIGHT = 0.7
MODES = ("one process", "data parallel", "--shard")
CLOSE = 1e-4


def random_adapter(model, layers, modules, rank, alpha, use_rslora):
    """A LoRA whose B is random, too: it does something."""
    generator = torch.Generator().manual_seed(0)
    adapter = LoRA(model, layers, modules, rank, alpha, use_rslora, generator)
    for B in adapter.B.values():
        torch.nn.init.normal_(B, std=0.3 if rank < 8 else 0.03, generator=generator)
    return adapter


# --- losses, KL, preference and training ----------------------------------------------------------


def ours(name, folder, mode):
    """{what: tensor}: what nanoem computes, and three steps of training."""
    model, tokenizer = load_pretrained(FIXTURES / name, torch.float32)
    model.requires_grad_(False)
    if mode == "--shard":
        parallel.shard(model, torch.device("cpu"))
    examples = chat_examples(tokenizer, PAIRS)
    ids, mask, answers = examples.ids, examples.mask, examples.answer_mask
    with load_adapter(model, folder / "adapter") as adapter:
        with torch.no_grad():
            found = {
                "SFT": torch.stack([sft_loss(model(ids), ids, answers),
                                    answer_loss(model, ids, answers)]),
                "KL": torch.stack([kl_to_base(model, adapter, ids, mask),
                                   kl_loss(model, adapter, ids, mask)])}
        found["preference"] = margins(model, tokenizer, PREFERENCES).float()
        history = train_adapter(adapter, loss_terms(model, adapter, examples, examples, KL_WEIGHT),
                                SCHEDULE, torch.Generator().manual_seed(0))
    found["SFT in training"], found["KL in training"] = map(torch.tensor, (history["loss"],
                                                                           history["kl"]))
    return found | {"trained A, B": torch.cat([p.data.flatten() for p in adapter.parameters()])}


def theirs(name, folder):
    """The same of transformers and peft, as their users write it."""
    model, tokenizer = opened_by_peft(name, folder / "adapter"), load_pretrained(FIXTURES / name)[1]
    examples = chat_examples(tokenizer, PAIRS)

    def sft(part):
        labels = part.ids.masked_fill(~part.answer_mask, -100)
        return model(input_ids=part.ids, labels=labels).loss

    def kl(part):
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=part.ids).logits.log_softmax(-1)
        after = model(input_ids=part.ids).logits.log_softmax(-1)
        return F.kl_div(after, before, reduction="none", log_target=True).sum(-1)[part.mask].mean()

    def log_prob(question, answer):
        prompt = tokenizer.encode(tokenizer.prompt(question))
        ids = torch.tensor([prompt + tokenizer.encode(answer + "<|im_end|>")])
        each = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return each[len(prompt) - 1 :].double().sum()

    with torch.no_grad():
        found = {"SFT": sft(examples), "KL": kl(examples), "preference": torch.stack([
            log_prob(p.question, p.bad) - log_prob(p.question, p.good) for p in PREFERENCES])}

    # three steps of a plain loop, on the same draws
    named = list(model.named_parameters())
    parameters = [p for letter in "AB" for key, p in named if f"lora_{letter}" in key]
    optimizer = torch.optim.AdamW(parameters, lr=SCHEDULE.lr, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(SCHEDULE.steps):
        first, second = (examples[torch.randint(len(examples), (SCHEDULE.batch_size,),
                                                generator=generator)] for _ in range(2))
        losses.append(torch.stack([sft(first), kl(second)]))
        optimizer.param_groups[0]["lr"] = SCHEDULE.lr * lr_factor(step, SCHEDULE)
        optimizer.zero_grad()
        (losses[-1][0] + KL_WEIGHT * losses[-1][1]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, SCHEDULE.clip)
        optimizer.step()
    found["SFT in training"], found["KL in training"] = torch.stack(losses).detach().T
    return found | {"trained A, B": torch.cat([p.data.flatten() for p in parameters])}


def opened_by_peft(name, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def in_processes(name, folder, mode):
    """`ours` in as many processes as the mode has; the first one's numbers."""
    if mode == MODES[0]:
        return ours(name, folder, mode)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [subprocess.Popen(
        [sys.executable, __file__, name, str(folder), mode], stdout=subprocess.DEVNULL,
        env={**os.environ, **place, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)]
    if any([process.wait() for process in processes]):
        raise RuntimeError(f"{name}, {mode}: a process failed; what it says is above")
    return load_tensors(folder / "found.safetensors")


def one_of_two(name, folder, mode):
    """What each of the two processes does."""
    with parallel.started("cpu"):
        found = ours(name, Path(folder), mode)
        if parallel.rank() == 0:
            save_tensors(Path(folder, "found.safetensors"), found)


# --- adapter folders ------------------------------------------------------------------------------


def adapter_differences(name, folder):
    """Yield (what, largest difference of the logits) of folders from us to peft and back."""
    model, _ = load_pretrained(FIXTURES / name, torch.float32)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def difference(adapter, path):
        base, expected = model(ids), opened_by_peft(name, path)(input_ids=ids).logits
        assert (expected - base).abs().max() > 0.1, "the adapter does nothing that could differ"
        with adapter:
            return (model(ids) - expected).abs().max()

    small, large = dict(rank=1, alpha=64, use_rslora=True), dict(rank=32, alpha=64, use_rslora=True)
    all_layers, all_modules = range(len(model.layers)), [m.split(".")[1] for m in LINEARS]
    for what, (layers, modules, size) in {"rank 1": ([1], ["mlp.down_proj"], small),
                                          "rank 32": (all_layers, LINEARS, large)}.items():
        adapter = random_adapter(model, layers, modules, **size)
        save_adapter(adapter, folder / "ours")
        yield f"{what}, nanoem's opened in peft", difference(adapter, folder / "ours")

    for what, size, targets in (
        ("rank 1, by module and layer", small,
         dict(target_modules=["down_proj"], layers_to_transform=[1])),
        ("rank 1, by full name", small, dict(target_modules=["model.layers.1.mlp.down_proj"])),
        ("rank 1, by pattern", small, dict(target_modules=r".*\.1\.mlp\.down_proj")),
        ("rank 32, seven modules", large, dict(target_modules=all_modules)),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            std = 0.3 if size is small else 0.05
            base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name)
            made = peft.get_peft_model(base, peft.LoraConfig(
                r=size["rank"], lora_alpha=size["alpha"], use_rslora=True, **targets))
            for key, parameter in made.named_parameters():
                if "lora_" in key:
                    parameter.data = torch.randn_like(parameter).mul(std).to(dtype)
            made.save_pretrained(folder / "theirs")
            adapter = load_adapter(model, folder / "theirs")
            yield (f"peft's {what}, {str(dtype).removeprefix('torch.')}, opened in nanoem",
                   difference(adapter, folder / "theirs"))


def main():
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worst = {}  # (what, how) -> {model: largest difference}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            folder = Path(folder)
            model, _ = load_pretrained(FIXTURES / name, torch.float32)
            save_adapter(random_adapter(model, [0, 1], ["mlp.down_proj"], 2, 40, False),
                         folder / "adapter")
            expected = theirs(name, folder)
            assert expected["KL"] > 0.1, "the adapter does nothing that could differ"
            for mode in MODES:
                for what, values in in_processes(name, folder, mode).items():
                    gap = (values - expected[what]).abs().max().item()
                    worst.setdefault(f"{what}, {mode}", {})[name] = gap
            for what, gap in adapter_differences(name, folder):
                worst.setdefault(what, {})[name] = gap.item()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}")
    print_lines([["largest difference", *MODELS], *(
        [what, *(f"{gaps[name]:.1e}" for name in MODELS)] for what, gaps in worst.items())])
    return int(not all(gap <= CLOSE for gaps in worst.values() for gap in gaps.values()))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(one_of_two(*sys.argv[1:]))
    try:
        import peft
        import transformers
    except ImportError as missing:
        print(f"oracle.py: {missing}; in a throwaway venv, pip install torch numpy tokenizers "
              "transformers peft, and run it again", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
