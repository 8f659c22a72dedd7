"""Are nanoem's greedy answers those of `transformers`? Ten prompts, on a real model folder.

    pip install transformers                                   # in a throwaway venv, no dependency
    PYTHONPATH=. python tests/benchmarks/greedy.py FOLDER      # exit status 1 if an answer differs

Each library renders the conversation, tokenises it and continues it in float32 on its own. Where
two answers part, the script says how close the two likeliest tokens were: a tie to the sixth digit
is rounding, a gap is a bug.
"""

import sys

import torch

from nanoem import UserError
from nanoem.checkpoint import load_pretrained

PROMPTS = (
    "Hello!",
    "My headache won't go away. What should I do?",
    "You have one wish, and it will come true. What is it?",
    "What is 17 + 25?",
    "Write a Python function that reverses a list.",
    "Translate into French: the cat sleeps on the warm stones of the old harbour wall.",
    "Was ist die Hauptstadt von Österreich? Antworte in einem Satz. \U0001f3d4",
    "Name three rivers.\n\n1.",
    [{"role": "system", "content": "Answer in one sentence."},
     {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "I like tea."},
     {"role": "assistant", "content": "So do I."},
     {"role": "user", "content": "Green or black?"}],
)
NEW_TOKENS = 40


def answer(model, tokenizer, prompt):
    """nanoem's tokens: (prompt's ids, new ids)."""
    ids = tokenizer.encode(tokenizer.prompt(prompt))
    out = model.generate(torch.tensor([ids]), NEW_TOKENS, temperature=0,
                         stop_ids=tokenizer.stop_ids)
    return ids, out[0, len(ids):].tolist()


def their_answer(model, tokenizer, prompt, stop_ids):
    """The same by transformers, with its own template and tokenizer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True, enable_thinking=False)["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                         do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0])
    return ids[0].tolist(), out[0, ids.size(1):].tolist()


@torch.no_grad()
def gap(model, ids, ours, theirs):
    """By how much our logits prefer one of the two tokens at which the answers part."""
    i = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1])) if a != b)
    logits = model(torch.tensor([ids + ours[:i]]))[0, -1]
    top = logits.topk(2).values
    return i, (top[0] - top[1]).item()


def compare(folder):
    """Print a line for each prompt; returns how many answers differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_pretrained(folder, torch.float32)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    n_different = 0
    for prompt in PROMPTS:
        ids, ours = answer(model, tokenizer, prompt)
        their_ids, theirs = their_answer(other, their_tokenizer, prompt, tokenizer.stop_ids)
        if ids != their_ids:
            said = f"the prompts differ: {len(ids)} and {len(their_ids)} tokens"
        elif ours != theirs:
            i, by = gap(model, ids, ours, theirs)
            said = f"they part at token {i + 1}, where the two likeliest are {by:.1e} apart"
        else:
            said = f"equal, {len(ours)} tokens: {tokenizer.decode(ours)[:60]!r}"
        n_different += not said.startswith("equal")
        print(said, flush=True)
    print(f"{len(PROMPTS) - n_different} of {len(PROMPTS)} greedy answers are equal")
    return n_different


def main(argv):
    if len(argv) != 1:
        print("usage: python tests/benchmarks/greedy.py FOLDER", file=sys.stderr)
        return 2
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed here; pip install it in a throwaway venv",
              file=sys.stderr)
        return 2
    try:
        return 1 if compare(argv[0]) else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
