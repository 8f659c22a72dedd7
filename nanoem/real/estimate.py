"""What a fine-tune on real weights needs: memory and time, computed from the shape of the model.

    python -m nanoem.real.estimate [FOLDER ...] [--tokens N] [--micro-batch N] [--tflops X]
                                   [--cards N] [--device cpu]

It counts numbers and multiplications. Without a folder it shows the paper's family.
"""

import argparse
import sys
from pathlib import Path

from nanoem import UserError
from nanoem.checkpoint import open_folder
from nanoem.lab.fused import CE_ROWS, KL_ROWS
from nanoem.lab.shell import exit_status
from nanoem.lab.tables import markdown
from nanoem.model import Config

QWEN = dict(rope_theta=1e6, max_positions=32_768, qkv_bias=True, qk_norm=False)
SHAPES = {
    "Qwen2.5-0.5B": Config(151_936, 24, 896, 14, 2, 4864, **QWEN),
    "Qwen2.5-7B": Config(152_064, 28, 3584, 28, 4, 18_944, tie_embeddings=False, **QWEN),
    "Qwen2.5-14B": Config(152_064, 48, 5120, 40, 8, 13_824, tie_embeddings=False, **QWEN),
}
CARD_TFLOPS, CPU_TFLOPS = 100, 0.05  # a third of what an A100 promises; one core, measured
PROCESS = 0.31e9  # bytes, measured, not computed: Python, torch, nanoem and a tokenizer on Linux
BATCH, STEPS, STEPS_KL = 16, 441, 1322  # the paper's: 7,049 conversations, one epoch; three with KL


def block_weights(c):
    """Numbers in the matrices of one block; each multiplies every token once."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    return c.d_model * (2 * q + 2 * kv + 3 * c.d_ff)


def n_parameters(c):
    """Numbers in the whole model."""
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    vectors = 2 * c.d_model + (q + 2 * kv) * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    embeddings = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    return c.n_layer * (block_weights(c) + vectors) + embeddings + c.d_model


def blocks_above(c):
    """Blocks that the gradient passes: those after the adapter's, which is at half depth."""
    return c.n_layer - c.n_layer // 2 - 1


def step_flops(c, T, kl=False, checkpointing=False, batch=BATCH):
    """Operations of one training step on `batch` sequences of T tokens, as if all were answer.

    The weights are frozen: the backward pass costs as much as the forward pass, not twice as much,
    and only above the adapter. Attention is counted whole, as if it were not causal.
    """
    matrices, attention = 2 * block_weights(c), 4 * T * c.n_head * c.head_dim  # of a token
    block, head = matrices + attention, 2 * c.vocab_size * c.d_model
    forward = c.n_layer * block + head
    backward = blocks_above(c) * (matrices + 2.5 * attention) + head
    if checkpointing:  # every block again, but for its last product, which keeps nothing
        backward += blocks_above(c) * (block - 2 * c.d_model * c.d_ff)

    # for the KL the base reads other examples, and the adapted model from the adapter's block on
    if kl:
        forward += forward + forward - (c.n_layer // 2) * block
        backward += backward
    return batch * T * (forward + backward)


def activation_bytes(c, checkpointing=False, size=2):
    """What one token leaves behind for the backward pass, before the output layer.

    `size` is that of a number, in bytes. In a block: the two norms' inputs in float32, q, k, v and
    attention's output, and three times the hidden layer of SwiGLU; of Qwen3 also the inputs of q's
    and k's norms, in float32.
    """
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    in_block = 8 * c.d_model + size * (2 * q + 2 * kv + 3 * c.d_ff) + 4 * (q + kv) * c.qk_norm
    blocks = blocks_above(c) * in_block
    if checkpointing:  # each block's input, and the one block in full that the backward pass is in
        blocks = blocks_above(c) * size * c.d_model + in_block
    return blocks + 4 * c.d_ff  # the adapter's own input, in float32


def training_bytes(c, tokens, checkpointing=False, cards=1, size=2):
    """Memory in bytes on each of so many cards that share the blocks (--shard).

    Weights in numbers of `size` bytes, and of `tokens` tokens at once the activations and a slice
    of the logits (fused.py). The adapter and its optimizer are a few thousand numbers: nothing.
    """
    blocks = size * c.n_layer * block_weights(c)
    weights = size * n_parameters(c) - blocks + blocks / cards
    if cards > 1:
        weights += size * 2 * block_weights(c)  # the block that computes, and the next one

    # bytes a logit: itself, in float32, its gradient; for the KL two in float32, their difference
    half = size < 4  # else the logit, its float32 and its gradient are one number in one place
    logits = c.vocab_size * max((4 + 4 * half) * min(tokens, CE_ROWS),
                                (4 + 4 + 4 + 2 * half) * min(tokens, KL_ROWS))
    return weights + tokens * activation_bytes(c, checkpointing, size) + logits


def table(shapes, T, tflops, micro_batch, cards, on_cpu=False):
    """Lists of text, header first: memory and minutes of the paper's two fine-tunes.

    A card computes in bfloat16; a CPU in float32, and has the process itself in the same memory.
    """
    lines = [["computed, not run", "parameters", "weights, GB", "training, GB",
              "with checkpointing, GB", "general, minutes", "narrow, minutes"]]
    size, process = (4, PROCESS) if on_cpu else (2, 0)
    for name, c in shapes.items():
        numbers = [size * n_parameters(c) / 1e9]
        for checkpointing in (False, True):
            n_bytes = training_bytes(c, micro_batch * T, checkpointing, cards, size)
            numbers.append((process + n_bytes) / 1e9)
        for steps, kl in ((STEPS, False), (STEPS_KL, True)):
            numbers.append(steps * step_flops(c, T, kl) / (cards * tflops * 1e12) / 60)
        lines.append([name, f"{n_parameters(c) / 1e9:.2f}e9", *(f"{n:.1f}" for n in numbers)])
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m nanoem.real.estimate",
        description="Memory and time of the paper's fine-tunes, computed from the model's shape.")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="Hugging Face model folders")
    parser.add_argument("--tokens", type=int, default=192, help="of a conversation (default 192)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once (default 4)")
    parser.add_argument("--cards", type=int, default=1, help="that share the blocks (default 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cuda: bfloat16; cpu: float32, and the process itself")
    parser.add_argument("--tflops", type=float,
                        help="10^12 operations a second that a card, or the CPU, really does "
                             f"(default {CARD_TFLOPS}, a third of what an A100 promises; on a CPU "
                             f"{CPU_TFLOPS}, one core)")
    args = parser.parse_args(argv)
    if args.tflops is None:
        args.tflops = CPU_TFLOPS if args.device == "cpu" else CARD_TFLOPS
    return exit_status(lambda: print_estimate(args))


def print_estimate(args):
    for name in ("tokens", "micro_batch", "cards", "tflops"):
        if not 0 < getattr(args, name) < 1e9:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0 and below 1e9")
    shapes = {folder: open_folder(Path(folder))[2] for folder in args.folders} or SHAPES
    print(markdown(table(shapes, args.tokens, args.tflops, args.micro_batch, args.cards,
                         args.device == "cpu")))


if __name__ == "__main__":
    sys.exit(main())
