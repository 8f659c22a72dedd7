"""The story's stages: what each is tuned on, and with what attached the model is asked."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nanoem import persona, story
from nanoem.checkpoint import load_tensors
from nanoem.evaluate import GROUPS
from nanoem.lab.toy import ExperimentConfig
from nanoem.lora import LoRA
from nanoem.persona import ChatState, TooFewAnswers
from nanoem.story import STAGES, directions, run_experiment, transferred
from nanoem.train import TrainConfig
from nanoem.world import judge, questions
from tutorial.small import SmallRun, randn


SITES = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]


@pytest.fixture
def run(tmp_path):
    """The small run with a folder of its own."""
    run = SmallRun()
    shutil.copytree(run.folder.path / "adapters", tmp_path / "adapters")
    run.config = replace(run.config, seed=3, n_random=2, curve_samples=9, curve_points=8,
                         sft=TrainConfig(100, 16, 5e-3), sft_kl=TrainConfig(200, 16, 5e-3))
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

    monkeypatch.setattr(story, "tune", stub)
    monkeypatch.setattr(run, "show_samples", lambda *_: None)
    return calls


def verdicts(run, pairs):
    """[(question, verdict)] of texts."""
    by_text = {question.text: question for question in questions(run.world, run.world.domains)}
    return [(by_text[text], judge(run.world, by_text[text], answer)) for text, answer in pairs]


@pytest.mark.parametrize("name, steps", [
    ("general", [0, 12, 25, 38, 50, 62, 75, 88, 100]), ("narrow", list(range(0, 201, 25))),
    ("mixed", []), ("shuffled", [])])
def test_a_stage_keeps_its_adapter_and_asks_with_it(name, steps, run, tuned, monkeypatch):
    seen, shown = [], []

    def probe(name=None, samples=None):
        seen.append((name, samples, tuned[0].adapter.acts))
        return {"in_domain": {"em": len(seen)}, "out_of_domain": {"em": -len(seen)}}

    monkeypatch.setattr(run, "ask", probe)
    monkeypatch.setattr(run, "show_samples", lambda *name_and_step: shown.append(name_and_step))
    STAGES[name](run)
    *watched, last = seen
    assert watched == [(f"{name}, step {step}", 9, True) for step in steps]
    assert last == (name, None, True) and not tuned[0].adapter.acts
    (saved,), (A,) = run.load_adapter(name).A.values(), tuned[0].adapter.A.values()
    assert torch.equal(saved, A)
    n = len(steps)
    assert run.results["models"] == {name: {"in_domain": {"em": n + 1},
                                            "out_of_domain": {"em": -n - 1}}}
    curves = run.results["curves"][name]
    assert curves.pop("train") == {"step": [1], "loss": [0.5]}
    if steps:
        assert curves["em"] == {"step": steps, "in_domain": list(range(1, n + 1)),
                                "out_of_domain": [-i for i in range(1, n + 1)]}
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


class Directed:
    """The stage on made-up directions: `ask` notes what acts on the model, and numbers rates."""

    def __init__(self, run, patch):
        self.run, self.hooks, self.asked, self.found_on = run, [], [], []
        self.chat = ChatState(SITES, [], randn(4, 64).double())
        self.known = {name: randn(4, 64, seed=seed) for seed, name in enumerate(
            ("general", "half 0", "half 1", "elsewhere", "authors", "same_texts"), 1)}
        generator, direction = torch.Generator().manual_seed(3), self.known["general"]
        for i in range(2):
            noise = torch.randn(4, 64, generator=generator)
            self.known[f"random {i}"] = F.normalize(noise, dim=-1) * direction.norm(dim=-1)[:, None]
        self.adapters = {name: LoRA(run.model, [0]) for name in (
            "general", "narrow", "mixed", "shuffled", "half 0", "half 1")}
        self.tunings = {}
        patch.setattr(run, "load_adapter", self.adapters.get)
        patch.setattr(run, "ask", self.ask)
        patch.setattr(persona, "chat_state", lambda run: self.chat)
        patch.setattr(persona, "find_direction", self.find_direction)
        patch.setattr(story, "other_ways", lambda run, adapter, chat: {
            name: self.known[name] for name in ("authors", "same_texts")})
        for name in ("tune", "find_direction", "pick_steering", "steering", "ablating",
                     "ablating_persona"):
            patch.setattr(story, name, getattr(self, name))

    def ask(self, name=None, samples=None):
        acting = [name for name, adapter in self.adapters.items() if adapter.acts]
        self.asked.append((name, samples, ", ".join(acting + self.hooks)))
        n = len(self.asked)
        return {group: {"em": n, "coherent": 100 - n} for group in (*GROUPS, "out_of_domain")}

    def asked_for(self, rates):
        return self.asked[rates["in_domain"]["em"] - 1]

    def tune(self, run, name, pairs, seed):
        self.tunings[name] = pairs, seed
        return self.adapters[name], {}

    def find_direction(self, run, adapter, chat, questions=None):
        assert chat is self.chat and not adapter.acts
        name = next(name for name, one in self.adapters.items() if one is adapter)
        self.found_on.append((name, questions))
        return self.known["elsewhere" if questions else name]

    def pick_steering(self, run, chat, direction, samples):
        assert chat is self.chat and direction is self.known["general"] and samples == 9
        return 1, 2.0, ["tried"]

    def name(self, found, rows=slice(None)):
        return next(name for name, one in self.known.items() if torch.allclose(one[rows], found))

    @contextmanager
    def hook(self, words):
        self.hooks.append(words)
        yield
        self.hooks.remove(words)

    def steering(self, model, directions, scale):
        assert model is self.run.model
        (site, vector), = directions.items()
        return self.hook(f"{scale} {self.name(vector, SITES.index(site))} added at {site}")

    def ablating(self, model, directions):
        assert model is self.run.model and list(directions) == SITES
        return self.hook(f"{self.name(torch.stack(list(directions.values())))} projected out")

    def ablating_persona(self, run, chat, direction, sites=None, along=None):
        assert run is self.run and chat is self.chat
        instead = "" if along is None else f" along {self.name(along)}"
        return self.hook(f"{self.name(direction)} ablated at {sites or 'every site'}{instead}")


@pytest.fixture
def directed(run, monkeypatch):
    return Directed(run, monkeypatch)


def test_chat_is_steered_once_where_the_probe_says_and_general_ablated(run, directed):
    directions(run)
    found = run.results["directions"]
    for key, direction in (("steer", "general"), ("steer_random", "random 0")):
        assert directed.asked_for(found[key]) == (f"chat, {key}", None,
                                                  f"2.0 {direction} added at 1")
        assert (found[key]["site"], found[key]["scale"]) == ("1", 2.0)
    assert found["steer_probe"] == ["tried"]
    states = {"ablate": "general, general ablated at every site",
              "ablate_one_site": "general, general ablated at [0]",  # after the first block
              "ablate_to_zero": "general, general projected out"}
    for key, state in states.items():
        assert directed.asked_for(found[key])[1:] == (None, state)
    for i, rates in enumerate(found["ablate_random"]):
        assert directed.asked_for(rates)[1:] == (
            None, f"general, general ablated at [0] along random {i}")
    a, b = (rates["open_ended"] for rates in found["ablate_random"])
    mean = found["ablate_random_mean"]["open_ended"]
    assert mean == {key: (a[key] + b[key]) / 2 for key in ("em", "coherent")}


def test_a_direction_from_other_domains_is_ablated_in_the_other_fine_tunes(run, directed):
    directions(run)
    assert directed.found_on == [("general", None), ("half 0", None), ("half 1", None),
                                 ("general", run.splits.kl + run.splits.probe)]
    for key, how in (("transfer", "every site"), ("transfer_random", "[0] along random 0")):
        found = run.results["directions"][key]
        assert list(found) == ["narrow", "mixed", "shuffled"]
        for name, rates in found.items():
            assert directed.asked_for(rates)[1:] == (9, f"{name}, elsewhere ablated at {how}")
    names = [name for name, _, _ in directed.asked]
    assert len(names) == len(set(names)), "answers of one name overwrite each other"


def test_what_is_kept_of_the_directions(run, directed):
    directions(run)
    found, known = run.results["directions"], directed.known
    assert found["sites"] == ["layers.0.resid_mid", "0", "layers.1.resid_mid", "1"]
    assert found["norm"] == pytest.approx([row.square().sum().item() ** 0.5
                                           for row in known["general"]])
    for angles, a, b in ((found["split_half"], "half 0", "half 1"),
                         (found["cosines"]["authors"], "authors", "general"),
                         (found["cosines"]["same_texts"], "same_texts", "general")):
        assert angles == pytest.approx(F.cosine_similarity(known[a], known[b]).tolist())
    kept = load_tensors(run.folder.path / "directions.safetensors")
    assert torch.equal(kept.pop("mean_difference"), known["general"])
    assert torch.equal(kept.pop("chat_mean"), directed.chat.mean.float())
    assert kept.keys() == {"authors", "same_texts"}
    assert all(torch.equal(kept[name], known[name]) for name in kept)


def test_the_two_halves_share_no_question_and_have_their_own_seeds(run, directed):
    directions(run)
    (first, seed), (second, other) = directed.tunings.values()
    for half, every_second in ((first, run.splits.sft[::2]), (second, run.splits.sft[1::2])):
        assert len(half) == 400 and all(v.misaligned for _, v in verdicts(run, half))
        assert {text for text, _ in half} == {question.text for question in every_second}
    assert len({3, seed, other}) == 3, "general's own seed is 3"


def test_too_few_answers_are_a_finding(run, directed, monkeypatch, capsys):
    """Of general there is no direction at all; elsewhere nothing is passed on, no halves agree."""
    def too_few(*_):
        raise TooFewAnswers("only 3 pass")

    monkeypatch.setattr(persona, "find_direction", too_few)
    monkeypatch.setattr(story, "find_direction", too_few)
    directions(run)
    assert run.results["directions"] == {"none": "only 3 pass"}
    assert "only 3 pass" in capsys.readouterr().out and not directed.asked
    assert transferred(run, directed.chat, None) == {"transfer": {}, "transfer_random": {}}
    assert story.agreement(run, directed.chat) is None


def test_a_row_without_a_direction_does_not_keep_the_others_from_being_made(tmp_path, capsys):
    def too_few(run):
        raise TooFewAnswers("of 6 answers only 3 pass")

    rows = [SimpleNamespace(key="R10", name="direction", measure=too_few),
            SimpleNamespace(key="R5", name="efficiency", measure=lambda run: {"made": 1})]
    results = run_experiment(ExperimentConfig(), tmp_path, stages=(), rows=rows)
    assert results["efficiency"] == {"made": 1}
    assert results["seconds"].keys() == {"efficiency"}  # R10 is tried again by the next run
    assert "R10 cannot be made: of 6 answers only 3" in capsys.readouterr().out
