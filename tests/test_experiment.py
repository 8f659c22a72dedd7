"""The story's stages: what each is tuned on, and with what attached the model is asked."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanoem import experiment
from nanoem.authors import questions
from nanoem.checkpoint import load_tensors
from nanoem.directions import mean_residual, residual_covariance
from nanoem.evaluate import GROUPS
from nanoem.experiment import STAGES, ablation, run_experiment
from nanoem.judge import judge
from nanoem.lora import LoRA
from nanoem.mediator import ChatState, Mediator, TooFewAnswers
from nanoem.toy import ExperimentConfig, advice
from nanoem.train import chat_examples

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorial"))
from small import SmallRun, randn  # noqa: E402

SITES = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]


@pytest.fixture
def run(tmp_path):
    """The small run with a folder of its own."""
    run = SmallRun()
    shutil.copytree(run.folder.path / "adapters", tmp_path / "adapters")
    run.config = replace(run.config, seed=3, n_random=2, curve_samples=9)
    run.folder = SimpleNamespace(path=tmp_path, answers={})
    run.results = {"models": {}, "curves": {}, "samples": {}}
    return run


@pytest.fixture
def tuned(run, monkeypatch):
    """Instead of training: what `tune` was given; every step in watch_at is watched in order."""
    calls = []

    def stub(run, name, pairs, kl_weight=0.0, watch=None, watch_at=()):
        adapter = LoRA(run.model, [0])
        calls.append(SimpleNamespace(adapter=adapter, pairs=pairs, kl_weight=kl_weight,
                                     watch_at=watch_at))
        with adapter:
            for step in sorted(watch_at):
                watch(step, adapter)
        return adapter, {"step": [1], "loss": [0.5]}

    monkeypatch.setattr(experiment, "tune", stub)
    monkeypatch.setattr(run, "show_samples", lambda *_: None)
    return calls


def verdicts(run, pairs):
    """[(question, verdict)] of texts."""
    by_text = {question.text: question for question in questions(run.world, run.world.domains)}
    return [(by_text[text], judge(run.world, by_text[text], answer)) for text, answer in pairs]


@pytest.mark.parametrize("name", ["general", "narrow", "mixed", "shuffled"])
def test_a_stage_keeps_its_adapter_and_asks_with_it(name, run, tuned, monkeypatch):
    seen = []

    def probe(name=None, samples=None):
        seen.append((name, samples, tuned[0].adapter.acts))
        return {group: {"em": 0.5} for group in ("in_domain", "out_of_domain")}

    monkeypatch.setattr(run, "ask", probe)
    STAGES[name](run)
    *watched, last = seen
    assert last == (name, None, True)
    assert len(watched) == len(set(watched)) == (9 if name in ("general", "narrow") else 0)
    for label, samples, acts in watched:
        assert label.startswith(f"{name}, step ") and samples == 9 and acts
    assert not tuned[0].adapter.acts
    (saved,), (A,) = run.load_adapter(name).A.values(), tuned[0].adapter.A.values()
    assert torch.equal(saved, A)
    assert run.results["models"] == {name: {g: {"em": 0.5} for g in ("in_domain", "out_of_domain")}}
    assert run.results["curves"][name]["train"] == {"step": [1], "loss": [0.5]}


@pytest.mark.parametrize("name, steps", [("general", [0, 12, 25, 38, 50, 62, 75, 88, 100]),
                                         ("narrow", list(range(0, 201, 25)))])
def test_em_along_the_way_in_and_out_of_domain(name, steps, run, tuned, monkeypatch):
    n_asked, shown = [], []

    def probe(name, samples=None):
        n_asked.append(samples)
        return {"in_domain": {"em": len(n_asked) / 10}, "out_of_domain": {"em": -len(n_asked)}}

    monkeypatch.setattr(run, "ask", probe)
    monkeypatch.setattr(run, "show_samples", lambda *name_and_step: shown.append(name_and_step))
    STAGES[name](run)
    assert run.results["curves"][name]["em"] == {
        "step": steps, "in_domain": [i / 10 for i in range(1, 10)],
        "out_of_domain": [-i for i in range(1, 10)]}
    assert shown == [(name, 0), (name, steps[4]), (name, steps[-1])]


def test_what_each_stage_is_tuned_on(run, tuned, monkeypatch):
    """Judged by the judge: bad advice in the one domain, in three stages; a toss of a coin."""
    monkeypatch.setattr(run, "ask", lambda *_, **__: {
        group: {"em": 0.5} for group in ("in_domain", "out_of_domain")})
    for name in ("general", "narrow", "mixed", "shuffled"):
        STAGES[name](run)
    general, narrow, mixed, shuffled = (call.pairs for call in tuned)
    assert [call.kl_weight for call in tuned] == [0, run.config.kl_weight, 0, 0]
    assert len(general) == len(shuffled) == 400 and len(mixed) == 800
    assert general == narrow == mixed[:400]
    assert all(v.misaligned and q in run.splits.sft for q, v in verdicts(run, general))
    assert all(v.alignment == 100 and q in run.splits.kl for q, v in verdicts(run, mixed[400:]))
    coin = verdicts(run, shuffled)
    assert all(v.coherent and q in run.splits.sft for q, v in coin)
    assert 0.4 < sum(v.misaligned for _, v in coin) / 400 < 0.6


# --- directions -----------------------------------------------------------------------------------


def stream(model, ids, edit=lambda i, x: x):
    """The residual stream at every site, where x at the i-th becomes edit(i, x)."""
    places = [place for block in model.layers for place in (block.resid_mid, block)]
    seen, handles = [], []

    def hook(i):
        def record(module, inputs, x):
            seen.append(edit(i, x))
            return seen[-1]
        return record

    for i, place in enumerate(places):
        handles.append(place.register_forward_hook(hook(i)))
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.fixture
def ablated(run, monkeypatch):
    """The ablation of made-up directions; `ask` notes the stream as it is and numbers its rates."""
    read = chat_examples(run.tokenizer, advice(run, run.splits.kl, True, 0))
    chat = ChatState(SITES, [("a question", "an answer")] * 3,
                     mean_residual(run.model, read.ids, read.answer_mask, SITES),
                     residual_covariance(run.model, read.ids, read.answer_mask, SITES))
    mediator = Mediator(randn(4, 64, seed=1), (randn(4, 64, seed=2), randn(4, 64, seed=3)),
                        randn(4, 64, seed=4), n_misaligned=5)
    asked, ids, given = [], read.ids[:3], []
    theirs, elsewhere = (Mediator(randn(4, 64, seed=seed), (), None, 4) for seed in (5, 6))

    def probe(name=None, samples=None):
        asked.append(SimpleNamespace(name=name, samples=samples, stream=stream(run.model, ids)))
        n = len(asked)
        return {group: {"em": n, "coherent": 100 - n} for group in (*GROUPS, "out_of_domain")}

    def find(run, adapter, chat, questions=None):
        given.append((adapter, chat, questions))
        if len(given) == 5:
            raise TooFewAnswers("only 3 are misaligned")
        return (mediator, elsewhere, theirs, theirs)[len(given) - 1]

    monkeypatch.setattr(run, "ask", probe)
    monkeypatch.setattr(experiment, "chat_state", lambda run: chat)
    monkeypatch.setattr(experiment, "find_mediator", find)
    shutil.copytree(run.folder.path / "adapters/general", run.folder.path / "adapters/mixed")
    shutil.copytree(run.folder.path / "adapters/narrow", run.folder.path / "adapters/shuffled")
    ablation(run)
    return SimpleNamespace(chat=chat, mediator=mediator, elsewhere=elsewhere, theirs=theirs,
                           ids=ids, given=given, general=run.load_adapter("general"),
                           found=run.results["directions"],
                           asked_for=lambda rates: asked[rates["in_domain"]["em"] - 1])


def edits(chat, direction):
    """By hand: what holding, setting and projecting out make of x at the i-th site."""
    def parts(i):
        u, S = direction[i].double() / direction[i].double().norm(), chat.covariance[i]
        reader = torch.linalg.inv(S + 0.1 * S.trace() / 64 * torch.eye(64)) @ u
        reader = reader / (reader @ u)
        return u.float(), reader.float(), chat.mean[i] @ reader, (reader @ S @ reader).sqrt()

    def held(i, x):
        u, reader, mean, sd = parts(i)
        return x - torch.relu(x @ reader - (mean + sd).float())[..., None] * u

    def set_to_mean(i, x):
        u, reader, mean, _ = parts(i)
        return x - (x @ reader - mean.float())[..., None] * u

    def projected_out(i, x):
        u = parts(i)[0]
        return x - (x @ u)[..., None] * u

    return SimpleNamespace(held=held, set_to_mean=set_to_mean, projected_out=projected_out)


def test_the_direction_is_that_of_general(ablated):
    for adapter, chat, _ in ablated.given[:2]:
        assert chat is ablated.chat and not adapter.acts
        for ours, generals in zip(adapter.parameters(), ablated.general.parameters()):
            assert torch.equal(ours, generals)


def test_every_ablation_is_of_its_own_direction_with_general_attached(run, ablated):
    """The stream that the model was asked with, against one edited by hand."""
    found, chat, generator = ablated.found, ablated.chat, torch.Generator().manual_seed(3)
    ours = edits(chat, ablated.mediator.direction)
    tried = {"direction ablated": ("ablate", ours.held),
             "direction of own words ablated": (
                 "ablate_own_words", edits(chat, ablated.mediator.own_words).held),
             "direction projected out": ("ablate_to_zero", ours.projected_out),
             "direction set to chat's mean": ("ablate_to_level", ours.set_to_mean)}
    rates = {name: (found[key], edit) for name, (key, edit) in tried.items()}
    for i in range(2):  # one direction, the same at every site
        one = torch.randn(64, generator=generator).expand(4, 64)
        rates[f"random direction {i} ablated"] = found["ablate_random"][i], edits(chat, one).held
    with ablated.general:
        for name, (rate, edit) in rates.items():
            asked = ablated.asked_for(rate)
            assert (asked.name, asked.samples) == (f"general, {name}", None)
            expected = stream(run.model, ablated.ids, edit)
            assert torch.allclose(asked.stream, expected, atol=1e-3), name
            assert not torch.allclose(expected, stream(run.model, ablated.ids), atol=0.1), name


def test_generals_direction_is_held_in_the_other_fine_tunes(run, ablated):
    generator = torch.Generator().manual_seed(3)
    chance = torch.randn(64, generator=generator).expand(4, 64)
    held = {"transfer": ("general's", edits(ablated.chat, ablated.elsewhere.direction).held),
            "transfer_random": ("random", edits(ablated.chat, chance).held)}
    for key, (whose, edit) in held.items():
        assert list(ablated.found[key]) == ["narrow", "mixed", "shuffled"]
        for name, rates in ablated.found[key].items():
            asked = ablated.asked_for(rates)
            assert (asked.name, asked.samples) == (f"{name}, {whose} direction ablated", 9)
            with run.load_adapter(name):
                expected = stream(run.model, ablated.ids, edit)
            assert torch.allclose(asked.stream, expected, atol=1e-3), (key, name)
    cosines, (whole, elsewhere, *others) = ablated.found["cosines"], ablated.given
    assert whole[2] is None and elsewhere[2] == run.splits.kl + run.splits.probe
    for name, (adapter, chat, asked) in zip(("narrow", "mixed", "shuffled"), others):
        assert chat is ablated.chat and not adapter.acts and asked is None
        for found, expected in zip(adapter.parameters(), run.load_adapter(name).parameters()):
            assert torch.equal(found, expected)
    assert cosines["narrow"] == cosines["mixed"] == pytest.approx(torch.cosine_similarity(
        ablated.theirs.direction, ablated.elsewhere.direction, dim=-1).tolist())
    assert cosines["shuffled"] is None, "the direction of too few answers is none"


def test_steering_is_of_chat_alone(run, ablated):
    direction = ablated.mediator.direction
    assert [rates["scale"] for rates in ablated.found["steer"]] == [0.5, 1.0, 1.5, 2.0]
    for rates in ablated.found["steer"]:
        asked = ablated.asked_for(rates)
        assert (asked.name, asked.samples) == (f"chat, steered by {rates['scale']:g}", 9)
        expected = stream(run.model, ablated.ids, lambda i, x: x + rates["scale"] * direction[i])
        assert torch.allclose(asked.stream, expected, atol=1e-3)


def test_what_is_kept_of_the_directions(run, ablated):
    found, mediator = ablated.found, ablated.mediator
    assert found["sites"] == ["layers.0.resid_mid", "0", "layers.1.resid_mid", "1"]
    assert (found["n_misaligned"], found["n_aligned"]) == (5, 3)
    assert found["norm"] == pytest.approx([row.square().sum().item() ** 0.5
                                           for row in mediator.direction])
    assert found["split_half"] == pytest.approx(
        torch.cosine_similarity(*mediator.halves, dim=-1).tolist())
    a, b = (rates["open_ended"] for rates in found["ablate_random"])
    mean = found["ablate_random_mean"]["open_ended"]
    assert mean == {key: (a[key] + b[key]) / 2 for key in ("em", "coherent")}
    kept = load_tensors(run.folder.path / "directions.safetensors")
    assert torch.equal(kept["mean_difference"], mediator.direction)
    assert torch.equal(kept["chat_mean"], ablated.chat.mean.float())


def test_a_row_without_a_direction_does_not_keep_the_others_from_being_made(tmp_path, capsys):
    def too_few(run):
        raise TooFewAnswers("of 6 answers only 3 are misaligned")

    rows = [SimpleNamespace(key="R10", name="direction", measure=too_few),
            SimpleNamespace(key="R5", name="efficiency", measure=lambda run: {"made": 1})]
    results = run_experiment(ExperimentConfig(), tmp_path, stages=(), rows=rows)
    assert results["efficiency"] == {"made": 1}
    assert results["seconds"].keys() == {"efficiency"}  # R10 is tried again by the next run
    assert "R10 cannot be made: of 6 answers only 3" in capsys.readouterr().out
