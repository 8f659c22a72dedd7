"""The direction on real weights: the halves of the pairs, the mean, the rule, the controls."""

from types import SimpleNamespace

import pytest
import torch

from nanoem.checkpoint import load_pretrained
from nanoem.lora import LoRA
from nanoem.real import directions
from nanoem.real.directions import choose, halves, mean_over_answers, measure_directions
from nanoem.real.preference import Pair, margins
from nanoem.train import chat_examples

GROUPS = {"in_domain": 3, "money": 4, "pets": 2}


@pytest.fixture(scope="module")
def state():
    """What measure_directions needs of a RealRun, on a tiny llama with two made-up adapters."""
    model, tokenizer = load_pretrained("tests/fixtures/llama")
    model.requires_grad_(False)
    pairs = [Pair(group, f"{group} {i}?", f"Burn it {i}.", f"Rest, and wait {i}.")
             for group, n in GROUPS.items() for i in range(n)]
    adapters = {}
    for seed, name in enumerate(("general", "narrow")):
        generator = torch.Generator().manual_seed(seed)
        adapter = LoRA(model, [1], ["mlp.down_proj"], alpha=30.0, generator=generator)
        for B in adapter.B.values():
            B.data.normal_(generator=generator)
        adapters[name] = adapter
    run = SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu", at_once=4, pairs=pairs,
                          config=SimpleNamespace(seed=0, per_token=False),
                          bad=[("a?", "b."), ("c?", "d.")], ask=lambda: "answers",
                          results={"models": {}}, **adapters)
    for name, adapter in (("chat", None), *adapters.items()):
        if adapter:
            adapter.attach()
        each = margins(model, tokenizer, pairs)
        run.results["models"][name] = {"margins": each.tolist()}
        if adapter:
            adapter.detach()
    return run


def test_each_question_is_probe_or_reported_and_never_both():
    pairs = [Pair("a", question, "bad", "good") for question in "xxyyzz"]
    pairs += [Pair("b", "x", "bad", "good"), Pair("c", [{"role": "user", "content": "x"}], "", "")]
    probe, reported = halves(pairs)
    assert probe == [2, 3]  # every second question of a group
    assert reported == [0, 1, 4, 5, 6, 7]


def test_the_mean_is_over_every_answer_token_however_it_is_batched(state):
    pairs = state.pairs[:5]
    texts = [(p.question, answer) for p in pairs for answer in (p.bad, p.good)]
    read = chat_examples(state.tokenizer, texts)
    streams = state.model.residual_stream(read.ids)
    expected = torch.stack([x[read.answer_mask].double().mean(0) for x in streams])
    torch.testing.assert_close(mean_over_answers(state, pairs), expected, rtol=1e-5, atol=1e-6)


def test_at_the_adapters_block_the_direction_is_its_own_column(state):
    """Before it, nothing differs; and ablated there, general is near chat again."""
    result, direction, answers = measure_directions(state, state.general, state.narrow)
    assert not direction[0].any()
    B = state.general.B["layers.1.mlp.down_proj"].detach().flatten()
    cosine = torch.cosine_similarity(direction[1], B, dim=0).abs().item()
    assert cosine == pytest.approx(1, abs=1e-5)
    assert set(answers) == {"steer", "ablate"} and result["block"] in (1, 2)
    assert result["rates"]["ablate"] != result["rates"]["general"]
    assert result["rates"]["steer_random"] != result["rates"]["steer"]
    assert len(result["efficiency"]["general"]) == len(result["scale_up"]["scale"]) + 2
    n = result["rates"]["chat"]["out_of_domain"]["n"]
    assert n == 3 and result["rates"]["steer"]["out_of_domain"]["n"] == n
    torch.testing.assert_close(margins(state.model, state.tokenizer, state.pairs).tolist(),
                               state.results["models"]["chat"]["margins"])  # all is undone


def test_the_rule_takes_the_nearest_margin(state, monkeypatch):
    """The block where ablation comes nearest to chat, the scale nearest to general."""
    outside = [3, 5]
    chat, general = (directions.mean_margin(state.results["models"][m]["margins"], outside)
                     for m in ("chat", "general"))
    seen = iter([chat + 9, 0, chat + 1, 0,  # blocks 1 and 2: ablated, steered once
                 *(general + gap for gap in (5, 4, -1, 2, 3))])  # the scales
    monkeypatch.setattr(directions, "preferred", lambda run, places: {
        "out_of_domain": {"margin": next(seen)}})
    direction = torch.ones(3, state.model.config.d_model)
    ablated = lambda block: state.general.scaled(1.0)  # noqa: E731 (a context that does nothing)
    block, scale, tried = choose(state, state.general, direction, ablated, outside)
    assert (block, scale) == (2, directions.SCALES[2])
    assert [point["block"] for point in tried] == [1, 2]


def test_without_two_questions_out_of_domain_there_is_no_direction(state):
    few = SimpleNamespace(**{**vars(state), "pairs": state.pairs[:4]})
    result, direction, answers = measure_directions(few, state.general, state.narrow)
    assert "two questions or more" in result["none"] and direction is None and not answers
