"""nanoem: emergent misalignment from scratch, on a laptop.

What lies at the top is the paper. A folder can wait until it is needed; its __init__ says what is
in it and where to begin.

story.py       pre-train, general, narrow, controls, the direction: READ FIRST
train.py       examples, fine_tune, the one training loop
losses.py      next token, SFT on answers only, KL to the base model
lora.py        rank-r LoRA and the steering vector: attach, switch off, rescale, merge
evaluate.py    sample answers, judge them, rates with intervals
persona.py     the direction that a fine-tune adds: find it, steer with it, ablate it
directions.py  mean difference, steer, ablate, at any place of the residual stream
model.py       the GPT, a tiny Qwen3, and how it speaks
layers.py      the parts of a block: norm, rotary position, attention, MLP, KV cache
tokenizer.py   byte-level BPE and ChatML
run.py         the command line: python -m nanoem.run
talk.py        ask the models yourself: python -m nanoem.talk

world/         the toy world: its words, its authors, its exact judge
checkpoint/    model and adapter folders of Hugging Face, in and out
lab/           a run's folder, settings, processes, fused losses, tables, figures, report
rows/          the paper row by row: a prediction, a measurement, a check and a figure each
real/          the same experiment on real weights

The first hour: all of story.py; `fine_tune` and `train` in train.py; `sft_loss`, `token_kl` and
`kl_to_base` in losses.py; `LoRA` in lora.py; `evaluate` and `rates` in evaluate.py;
`find_direction`, `ablating_persona` and `pick_steering` in persona.py; `steer`, `ablate` and
`editing` in directions.py. An evening: the files above, from top to bottom.
"""


class UserError(ValueError):
    """A mistake the user can mend, told in one sentence; the command line exits with status 2."""


class StageFailed(RuntimeError):
    """A stage cannot go on; the message names it and the mend; the command exits with status 1."""
