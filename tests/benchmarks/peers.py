"""nanoem beside transformers and peft: time, memory and FLOP/s of the same work.

    python tests/benchmarks/peers.py        # in a throwaway venv that also has transformers, peft

Both sides open one model folder and one adapter folder, get the same batches and the same threads,
and take turns; a time is the median over the turns. In the first turn they must come to the same
losses, tokens or answers. `kernels` are the matrix products and attention within nanoem's time, and
`at most` is how many times faster than the peer a job of nothing else would be. The peer is set up
as a user who cares for speed would: sdpa attention on its causal path (right padding needs no
mask), fused AdamW, a plain loop instead of a Trainer, one left-padded batch to sample from.
"""

import contextlib
import io
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))
try:
    import peft
    import transformers
except ImportError as missing:
    print(f"peers.py: {missing}; in a throwaway venv, pip install torch numpy tokenizers "
          "transformers peft, and run it again", file=sys.stderr)
    sys.exit(2)

import torch
from torch.nn import functional as F

from measure import kernel_seconds, matmul_peak, peak_megabytes, seconds, training_flops
from nanoem.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
from nanoem.evaluate import GROUPS, EvalConfig, evaluate
from nanoem.lab.fused import pretrain_loss
from nanoem.lora import LoRA
from nanoem.model import GPT, Config
from nanoem.tokenizer import Tokenizer
from nanoem.train import (TrainConfig, chat_examples, loss_terms, lr_factor, pad, train,
                          train_adapter)
from nanoem.world import WorldConfig, documents, judge, load_world, make_splits, write_pairs

TURNS = {"toy": 31, "larger": 9}  # of each side; the median counts
SIZES = {"toy": {}, "larger": dict(vocab_size=2048, n_layer=4, d_model=256, n_head=4, n_kv_head=2,
                                   d_ff=768)}
SCHEDULE = TrainConfig(steps=4, batch_size=16, lr=1e-3)  # of a turn
KL_WEIGHT = 10.0


class Texts:
    """What there is to read, to fine-tune on and to ask: the toy world's."""

    def __init__(self):
        self.world, world = load_world(), WorldConfig()
        texts = documents(self.world, world, 3000, seed=0)
        self.tokenizer = Tokenizer.train(texts)
        encoded = self.tokenizer.encode_batch(texts[:32])
        self.ids = pad([tokens[:96] for tokens in encoded], self.tokenizer.pad_id)  # (32, 96)
        splits = make_splits(self.world, world)
        self.sft, self.kl = (
            chat_examples(self.tokenizer, write_pairs(self.world, questions, 400, good, seed=0))
            for questions, good in ((splits.sft, False), (splits.kl, None)))
        self.groups = {group: getattr(splits, group) for group in GROUPS}


def write_folders(texts, shape, path):
    """A random model and a rank-1 LoRA at its middle layer -> path/model, path/adapter."""
    config = Config(**{"vocab_size": texts.tokenizer.vocab_size, **shape})
    generator = torch.Generator().manual_seed(0)
    model = GPT(config).init_weights(generator)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1  # or it would only repeat the last token
    save_pretrained(model, texts.tokenizer, path / "model")
    adapter = LoRA(model, [config.n_layer // 2], ["mlp.down_proj"], alpha=4, generator=generator)
    for B in adapter.B.values():
        torch.nn.init.normal_(B, std=0.02, generator=generator)
    save_adapter(adapter, path / "adapter", "../model")


def open_peer(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path / "model", dtype=torch.float32, attn_implementation="sdpa", use_cache=False)


def optimise(parameters, loss_of):
    """The peer's training loop: SCHEDULE.steps steps on loss_of(), with nanoem's settings."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SCHEDULE.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i, SCHEDULE))
    losses = []
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, SCHEDULE.clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# --- the five jobs: each gives two functions that do the same work, ours and the peer's -----------


def full_step(texts, path):
    model, peer = load_pretrained(path / "model")[0], open_peer(path).train()
    mask = texts.ids != texts.tokenizer.pad_id
    labels = texts.ids.masked_fill(~mask, -100)

    def objective(step):
        loss = pretrain_loss(model, texts.ids, None if mask.all() else mask)
        return loss, {"loss": loss}, texts.ids.numel()

    return (lambda: torch.tensor(train(objective, model.parameters(), SCHEDULE)["loss"]),
            lambda: optimise(peer.parameters(), lambda: peer(texts.ids, labels=labels).loss))


def lora_step(texts, path, kl_weight=0.0):
    """SFT of the adapter; with kl_weight the peer holds the base as a second model."""
    model, peer = load_pretrained(path / "model")[0].requires_grad_(False), open_peer(path)
    adapter = load_adapter(model, path / "adapter").attach()
    peer = peft.PeftModel.from_pretrained(peer, path / "adapter", is_trainable=True).train()
    base = open_peer(path).eval() if kl_weight else None

    def ours():
        generator = torch.Generator().manual_seed(0)
        found = train_adapter(adapter, loss_terms(model, adapter, texts.sft, texts.kl, kl_weight),
                              SCHEDULE, generator)
        return torch.tensor(found["loss"]) + kl_weight * torch.tensor(found.get("kl", 0.0))

    def theirs():
        generator = torch.Generator().manual_seed(0)

        def draw(examples):
            size = (SCHEDULE.batch_size,)
            return examples[torch.randint(len(examples), size, generator=generator)]

        def loss_of():
            sft = draw(texts.sft)
            labels = sft.ids.masked_fill(~sft.answer_mask, -100)
            loss = peer(input_ids=sft.ids, labels=labels).loss
            if not kl_weight:
                return loss
            kl = draw(texts.kl)
            with torch.no_grad():
                before = base(kl.ids).logits.log_softmax(-1)
            after = peer(input_ids=kl.ids).logits.log_softmax(-1)
            each = F.kl_div(after, before, reduction="none", log_target=True).sum(-1)  # (B, T)
            return loss + kl_weight * (each * kl.mask).sum() / kl.mask.sum()

        return optimise(peer.parameters(), loss_of)

    return ours, theirs


def sft_kl_step(texts, path):
    return lora_step(texts, path, KL_WEIGHT)


def generation(texts, path):
    """64 prompts of 32 tokens, 32 new tokens, greedy, with a KV cache; nothing stops before."""
    model, peer = load_pretrained(path / "model")[0], open_peer(path).eval()
    peer.generation_config.eos_token_id = None
    prompts = texts.ids.view(-1, 32)[:64]
    return (lambda: model.generate(prompts, 32, temperature=0),
            lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts),
                                  max_new_tokens=32, do_sample=False, use_cache=True))


def evaluation(texts, path, temperature=1.0):
    """400 answers of at most 24 tokens, decoded and judged."""
    model, peer = load_pretrained(path / "model")[0], open_peer(path).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path / "model",
                                                                     padding_side="left")
    config = EvalConfig(samples_per_group=100, temperature=temperature)
    sampling = {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}

    def ours():
        said = evaluate(model, texts.tokenizer, partial(judge, texts.world), texts.groups, config,
                        seed=0)
        return [(a.answer, a.verdict) for a in said]

    def theirs():
        asked = [q for qs in texts.groups.values() for q in qs for _ in range(-(-100 // len(qs)))]
        prompts = [texts.tokenizer.prompt(question.text) for question in asked]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = peer.generate(**batch, max_new_tokens=24, use_cache=True, **sampling)
        new = ids[:, batch.input_ids.size(1) :]
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text, judge(texts.world, question, text)) for question, text in zip(asked, said)]

    return ours, theirs


JOBS = {"full training step": full_step, "rank-1 LoRA step": lora_step,
        "SFT + KL step": sft_kl_step, "greedy generation": generation,
        "400 answers, judged": evaluation}


# --- measuring ------------------------------------------------------------------------------------


def check_same(ours, theirs):
    """Both sides must have done the same work."""
    found, expected = ours(), theirs()
    if isinstance(found, list):
        assert found == expected, "the two sides answer differently"
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def measure(texts, size, path):
    """Print the rows of one size; returns the seconds of a full training step, ours and theirs."""
    write_folders(texts, SIZES[size], path)
    for name, job in JOBS.items():
        with contextlib.redirect_stdout(io.StringIO()):  # the training loop's progress
            check_same(*(job(texts, path, 0.0) if job is evaluation else job(texts, path)))
            sides = job(texts, path)
            turns = [list(map(seconds, sides)) for _ in range(TURNS[size])]
            kernels = [kernel_seconds(sides[0]) for _ in range(5)]
            memory = list(map(peak_megabytes, sides))
        n = SCHEDULE.steps if name.endswith("step") else 1
        ours, theirs, least = (median(side) / n for side in (*zip(*turns), kernels))
        times = [1000 * ours, 1000 * theirs, theirs / ours, 1000 * least, theirs / least]
        print(f"| {size} | {name} |", *(f"{x:.1f} |" for x in times),
              *(f"{megabytes:.0f} |" for megabytes in memory), flush=True)
        if job is full_step:
            full = ours, theirs
    return full


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    texts = Texts()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}, {torch.get_num_threads()} threads\n")
    print("| size | job | nanoem, ms | peer, ms | times faster | kernels, ms | at most "
          "| nanoem, MB | peer, MB |\n|---|---" + "|---:" * 7 + "|")
    lines = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            full = measure(texts, size, Path(folder))
            model, _ = load_pretrained(Path(folder, "model"))
        flops, peak = training_flops(model, *texts.ids.shape), matmul_peak()
        ours, theirs = (f"{flops / side / 1e9:.0f} ({flops / side / peak:.0%})" for side in full)
        lines.append(f"{size}: a full training step at {ours} GFLOP/s, the peer's at {theirs}; "
                     f"the fastest matrix product at {peak / 1e9:.0f}")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
