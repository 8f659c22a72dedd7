"""Where the persona lives: on which tokens the adapter acts and its direction reads (R20)."""

from contextlib import contextmanager, nullcontext

import torch

from nanoem.evaluate import GROUPS
from nanoem.lab.plots import bar, colour_texts
from nanoem.persona import by_site, general_direction
from nanoem.rows.monitor import readings_of, token_scores
from nanoem.rows.row import SPREAD, Row, em_and_coherence, of_seeds, out, percent_of, rates_of
from nanoem.train import chat_examples

CLASSES = ("question", "template", "answer")
TEMPLATE = "<|im_end|>\n<|im_start|>assistant\n"  # what stands between a question and its answer


@contextmanager
def acting_on(adapter, wanted, n_template):
    """Inside, the adapter acts on tokens of the `wanted` CLASSES only, while answers are sampled.

    With a cache the first pass reads the whole prompt, which ends with the n_template tokens of the
    template; every later pass reads one new token, the answer's.
    """
    delta = adapter.delta

    def masked(name, x):  # x (B, T, in)
        T = x.size(1)
        prompt = ["question"] * (T - n_template) + ["template"] * n_template
        classes = ["answer"] if T == 1 else prompt
        acts = torch.tensor([kind in wanted for kind in classes], device=x.device)
        return delta(name, x) * acts[:, None]

    try:
        adapter.delta = masked
        yield adapter
    finally:
        del adapter.delta  # what is left is the class's own


def measure_tokens(run):
    adapter = run.load_adapter("general")
    n_template = len(run.tokenizer.encode(TEMPLATE))
    rates = {"all": em_and_coherence(run.results["models"]["general"])}
    for kind in CLASSES:
        others = [other for other in CLASSES if other != kind]
        for name, wanted in ((f"only {kind}", [kind]), (f"all but {kind}", others)):
            with acting_on(adapter, wanted, n_template):
                rates[name] = rates_of(run, adapter)
    return {"em": rates, "texts": read_answers(run)}


def read_answers(run):
    """Eight answers of chat, general and narrow, token by token: [{model, tokens, scores}, ...]."""
    # how chat's own answers read along general's direction, at the last site
    chat, direction = general_direction(run)
    site, vector = list(by_site(chat, direction).items())[-1]
    own = chat_examples(run.tokenizer, chat.aligned, run.device)
    readings = readings_of(run.model, own.ids, own.answer_mask, {site: vector})

    # how every token of other answers reads
    adapters = {"chat": nullcontext(), "general": run.load_adapter("general"),
                "narrow": run.load_adapter("narrow")}
    texts = []
    for group in GROUPS:
        for question in getattr(run.splits, group)[:2]:
            for name, adapter in adapters.items():
                with adapter:
                    texts.append({"model": name, **read_answer(run, question, readings)})
    return texts


def read_answer(run, question, readings):
    """One greedy answer of the model as it is, and how far each token lies along the direction."""
    tokenizer = run.tokenizer
    ids = torch.tensor([tokenizer.encode(tokenizer.prompt(question.text))], device=run.device)
    ids = run.model.generate(ids, run.config.evaluation.max_new_tokens, temperature=0,
                             stop_ids=tokenizer.stop_ids)
    tokens = [tokenizer.backend.decode([i], skip_special_tokens=False) for i in ids[0].tolist()]
    return {"tokens": tokens, "scores": token_scores(run.model, ids, readings)[0].tolist()}


def tokens_hold(result):
    """The adapter does half of its harm on the template alone, a quarter on the question alone."""
    em = {name: out(rates) for name, rates in result["em"].items()}
    return (em["all"] >= SPREAD and em["only template"] >= 0.5 * em["all"]
            and em["only question"] >= 0.25 * em["all"] and em["only answer"] <= 0.05)


def draw_tokens(axes, results):
    names = list(results[0]["em"])
    for i, name in enumerate(names):
        colour = "general" if name == "all" else "narrow" if name.startswith("only") else "mixed"
        bar(axes[0], i, list(map(out, of_seeds(results, "em", name))), 0.7, colour)
    axes[0].set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=6.5)
    axes[0].set_xlabel("tokens on which general's adapter acts")
    colour_texts(axes[1], results[0]["texts"])


def tokens_finding(results):
    em = {name: percent_of(results, out, "em", name) for name in results[0]["em"]}
    return (f"The adapter on the template's tokens alone: {em['only template']} bad out of domain "
            f"(everywhere {em['all']}), on the question's {em['only question']}, on the answer's "
            f"{em['only answer']}; everywhere but on the template {em['all but template']}")


ROWS = [
    Row("R20", "tokens",
        "The adapter acts through the prompt: on the template's tokens alone it keeps at least "
        "half of its out-of-domain em, on the question's alone a quarter; on the answer's alone "
        "at most 5% of the answers are bad.",
        "Classes are of unlike size: a template has five tokens, a question about seven. And what "
        "acts on the prompt is read by every token of the answer.",
        measure_tokens, tokens_hold, tokens_finding, draw_tokens, panels=2,
        size=(12, 5.6), widths=(1.2, 3), opposites=("only template", "only answer")),
]
