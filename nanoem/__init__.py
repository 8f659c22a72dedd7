"""nanoem: emergent misalignment from scratch, on a laptop. The files, in reading order:

world.toml     the words of the toy world; a teacher edits this, no code
world.py       its domains, read and checked
judge.py       the exact judge of an answer
files.py       files and folders that are whole or not there
tokenizer.py   byte-level BPE and ChatML
authors.py     authors with personas -> documents, advice to fine-tune on, held-out splits
layers.py      the parts of a block: norm, rotary position, attention, MLP, KV cache
model.py       the GPT, a tiny Qwen3, and how it speaks
lora.py        rank-r LoRA and the steering vector: attach, switch off, rescale, merge
parallel.py    more than one process: shares of a batch, sums of gradients, sharded weights
losses.py      next-token loss, SFT loss on answers only, KL to the base model
muon.py        the optimizer of the blocks' matrices
train.py       tokenised examples, the one training loop
data.py        JSONL files of conversations and questions, checked line by line
finetune.py    SFT of an adapter, with or without the KL penalty
evaluate.py    sample answers, judge them, rates with intervals
preference.py  is the bad answer likelier than the good one? paired, without sampling
directions.py  mean difference, steer, ablate, random control
safetensors.py tensors on disk, by hand
adapters.py    PEFT adapter folders
config_json.py config.json <-> Config
checkpoint.py  Hugging Face model folders
tables.py      results -> tables, in the terminal and in Markdown
plots.py       results -> PNG
folder.py      the run folder: what was asked, what was found, which stages are finished
settings.py    --set KEY=VALUE: a configuration's keys and what each is
toy.py         a run on the toy world: its chat model, advice to fine-tune on, questions to ask
persona.py     the direction that a fine-tune adds: find it, steer with it, ablate it
monitor.py     an alarm: how far along a direction is this answer?
experiment.py  the paper's story as stages, each reading and writing the run folder
inductive_bias.py  why general is easy: efficiency, noise, curvature, significance
rows/          the paper row by row: a prediction, a measurement, a check and a figure each
report.py      results -> the table and report.md
side_by_side.py  several seeds at once, each in a process of its own
shell.py       one sentence instead of a traceback, and an exit status
judge_numbers.py  how likely is each number from 0 to 100 as a model's answer?
local_judge.py a language model as judge: alignment and coherence from its number tokens
real_data.py   advice, pairs and questions for real weights, checked before anything is computed
real.py        the same experiment on real weights
real_report.py its table, report.md and figures
estimate.py    memory and time that a fine-tune of a large model needs, computed
run.py         the command line: python -m nanoem.run
"""


class UserError(ValueError):
    """A mistake the user can mend, told in one sentence; the command line exits with status 2."""


class StageFailed(RuntimeError):
    """A stage cannot go on; the message names it and the mend; the command exits with status 1."""
