"""The toy run: what its seed decides, what it asks, and what an adapter is tuned on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nanoem import UserError, story
from nanoem.evaluate import GROUPS, Answer, EvalConfig, Question, Verdict
from nanoem.lab import toy
from nanoem.lab.toy import ExperimentConfig, Run
from nanoem.model import GPT
from nanoem.story import bad_advice, pretrain, tune
from nanoem.train import TrainConfig
from nanoem.world import documents
from tutorial.small import SmallRun

TINY = ExperimentConfig(
    seed=1, context=24, evaluation=EvalConfig(samples_per_group=2, max_new_tokens=2),
    pretrain=TrainConfig(steps=5, batch_size=8, lr=8e-3, muon_lr=0.02, warmup=2))


@pytest.fixture
def run():
    run = SmallRun()
    run.config = replace(run.config, seed=5)
    return run


def test_pretraining_repeats_to_the_bit_and_another_seed_is_another_model(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = Run(replace(TINY, seed=seed), tmp_path / name)
        torch.manual_seed(len(weights))  # somebody else's numbers
        pretrain(run)
        weights.append(run.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_pre_training_reads_its_seeds_corpus_and_drops_from_every_site(tmp_path, monkeypatch):
    """Here dropping is halving; the loss is that of a model halved by hand, text by text."""
    run, dropped, muon, losses = Run(replace(TINY, context=120, dropout=0.3), tmp_path), [], [], []

    def halve(x, share, noise):
        dropped.append((len(losses), share, noise.initial_seed()))
        return x / 2

    def no_steps(objective, *_, matrices):
        muon.extend(matrices)
        for step in (3, 4):
            losses.append(objective(step)[0].item())
            assert not hooks(run.model), "a hook is left"

    monkeypatch.setattr(story, "dropout", halve)
    monkeypatch.setattr(story, "train", no_steps)
    torch.manual_seed(9)  # somebody else's numbers
    pretrain(run)
    assert dropped == [(i, 0.3, 1) for i in (0, 1) for site in range(4)]
    first = GPT(run.model.config).init_weights(torch.Generator().manual_seed(1))
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, first.get_parameter(name)), name
    wanted = [p for p in first.layers.parameters() if p.dim() == 2]
    assert len(muon) == 14 and all(map(torch.equal, muon, wanted))

    run.config = replace(run.config, n_sft_examples=8,
                         sft=TrainConfig(steps=1, batch_size=2, lr=0.1))
    with tune(run, "sft", bad_advice(run))[0]:
        run.ask()
    assert len(dropped) == 8 and not hooks(run.model)

    for block in first.layers:
        for place in (block.resid_mid, block):
            place.register_forward_hook(lambda module, inputs, x: x / 2)
    total, lengths = 0.0, []
    for text in documents(run.world, TINY.world, 40, seed=1)[32:]:
        ids = torch.tensor(run.tokenizer.encode(text)[:120])
        lengths.append(len(ids))
        total += F.cross_entropy(first(ids[None])[0, :-1], ids[1:], reduction="sum").item()
    assert min(lengths) < max(lengths) == 120, "some are cut, and some are padded"
    assert losses[1] == pytest.approx(total / (sum(lengths) - 8), rel=1e-5)


def test_a_folder_of_another_world_is_refused(tmp_path, monkeypatch):
    Run(TINY, tmp_path / "run").folder.once("chat", lambda: None)
    Run(TINY, tmp_path / "run")  # the same: welcome
    edited = tmp_path / "world.toml"
    edited.write_bytes(toy.WORLD_TOML.read_bytes() + b"\n")
    monkeypatch.setattr(toy, "WORLD_TOML", edited)
    with pytest.raises(UserError, match="was made with world_toml="):
        Run(TINY, tmp_path / "run")


def asked(monkeypatch):
    """Let the model give a bad answer in the technical register; returns how it was asked."""
    calls = []

    def stub(model, tokenizer, world, groups, sampling, seed):
        calls.append(SimpleNamespace(groups=groups, sampling=sampling, seed=seed))
        return [Answer(group, Question("medical", 0, "?"), "", Verdict(100, 0, 0, technical=True))
                for group in groups]

    monkeypatch.setattr(toy, "evaluate", stub)
    return calls


def test_asking_is_of_the_runs_own_questions_or_of_those_that_are_given(run, monkeypatch):
    calls, own = asked(monkeypatch), run.splits
    run.ask()
    other = replace(own, in_domain=own.sft, open_ended=own.probe)
    run.ask("other", samples=7, splits=other, groups=("in_domain", "open_ended"))
    assert calls[0].groups == {group: getattr(own, group) for group in GROUPS}
    assert calls[1].groups == {"in_domain": own.sft, "open_ended": own.probe}
    assert calls[0].sampling == run.config.evaluation
    assert calls[1].sampling == replace(run.config.evaluation, samples_per_group=7)
    assert calls[0].seed == calls[1].seed == 5, "the same seed: answers are paired"
    assert list(run.folder.answers) == ["other"]


def test_asking_for_another_trait_counts_that_trait(run, monkeypatch):
    asked(monkeypatch)
    assert run.ask()["in_domain"]["em"] == 1
    plain = run.ask(trait=lambda verdict: not verdict.technical)
    assert plain["in_domain"]["em"] == plain["out_of_domain"]["em"] == 0


@pytest.mark.parametrize("change, message", [
    ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout=-0.1 must be at least 0"),
    ({"sft": TrainConfig(1, 1, lr=0.1, muon_lr=0.1)}, "sft.muon_lr and sft_kl.muon_lr must be 0"),
])
def test_a_recipe_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ExperimentConfig(**change)
