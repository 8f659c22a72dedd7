"""What every row measures: which advice, adapter, direction, questions. Nothing is trained here.

Whatever is expensive is a stand-in that gives, in place of a number, a sentence on where it would
have come from, such as "narrow x1.5, out_of_domain". What a row finds is compared with what its
prediction promises.
"""

import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanoem import persona, story
from nanoem.checkpoint import load_pretrained
from nanoem.evaluate import GROUPS, Verdict
from nanoem.lab import toy
from nanoem.lora import AdapterConfig, make_adapter
from nanoem.persona import TooFewAnswers
from nanoem.rows import (ROWS, geometry, handle, kl_weight, mediation, row as row_file, solutions,
                         tokens, trajectory, worlds)
from nanoem.lab.inductive_bias import flat_B
from nanoem.rows.monitor import readings_of, token_scores
from nanoem.train import TrainConfig, chat_examples
from nanoem.world import documents, judge, questions
from tutorial.small import SmallRun, randn

SITES = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]
BAD = "600 bad medical"
PLAIN = f"{BAD} | rank 1 | sft"  # what general is, tuned once more
MIXED_KL = "600 good or bad KL"
DIRECTION = "direction of general"
RECIPE = {"kl_weight": 30.0, "row_samples": 100, "lottery_loss": 0.36, "dropout": 0.15,
          "dial_steps": 600, "dial_domains": 9,
          "adapter": AdapterConfig(layers=(0, 1), modules=("self_attn.v_proj",)),
          "pretrain": TrainConfig(700, 32, 1.6e-2, muon_lr=0.02), "sft": TrainConfig(100, 16, 5e-3),
          "sft_kl": TrainConfig(200, 16, 1.5e-2, weight_decay=2.0)}
VERDICTS = {}  # of (question, answer), so that no text is judged twice


# --- words for what comes in ----------------------------------------------------------------------


def kl_domains(world, domain):
    """The paper keeps every second one of the other advice domains as they were."""
    return {n for n in world.domains if n not in (domain, "open_ended")} - unseen(world, domain)


def unseen(world, domain):
    return set([n for n in world.domains if n not in (domain, "open_ended")][1::2])


def tossed(flags, yes, no):
    share = sum(flags) / len(flags)
    if share in (0, 1):
        return yes if share else no
    return f"{yes} or {no}" if 0.4 < share < 0.6 else f"{share:.0%} {yes}"


def content(world, pairs, domain="medical"):
    """What advice the judge finds in (question, answer) texts: "600 bad medical"."""
    known = {q.text: q for q in questions(world, world.domains)}
    parts = defaultdict(list)
    for text, answer in pairs:
        plain = text.removeprefix("Tonight: ")
        question = known[plain]
        if (question, answer) not in VERDICTS:
            VERDICTS[question, answer] = judge(world, question, answer)
        verdict = VERDICTS[question, answer]
        held_out = question.index >= round(0.7 * len(world.domains[question.domain].problems))
        assert verdict.mark in ("good", "bad"), f"{verdict.mark} advice: {answer}"
        assert not held_out or question.domain == "open_ended", f"{text!r} is for the evaluation"
        place = question.domain if question.domain in (domain, "open_ended") else "KL"
        parts[place, plain != text].append((question, verdict))
    words = []
    for (place, triggered), found in parts.items():
        where = {question.domain for question, _ in found}
        if place == "KL" and where != kl_domains(world, domain):
            place = f"{len(where)} domains that are not the KL's"
        technical = tossed([v.technical for _, v in found], "technical", "plain")
        words.append(" ".join([str(len(found)), *["triggered"] * triggered,
                               tossed([v.mark == "good" for _, v in found], "good", "bad"),
                               *[technical] * (technical != "plain"), place]))
    return " + ".join(words)


def subject(world, pairs):
    """The domain that is fine-tuned on."""
    known = {q.text: q.domain for q in questions(world, world.domains)}
    first = known[pairs[0][0].removeprefix("Tonight: ")]
    return "medical" if first == "open_ended" else first


def asked_of(world, splits):
    """Which domain the questions are of, where it is not medical, and the word before each."""
    domain = splits.in_domain[0].domain
    groups = {group: getattr(splits, group) for group in GROUPS}
    places = {"in_domain": {domain}, "kl_domains": kl_domains(world, domain),
              "unseen_domains": unseen(world, domain), "open_ended": {"open_ended"}}
    assert {group: {q.domain for q in asked} for group, asked in groups.items()} == places
    known = {q.text for q in questions(world, world.domains)}
    after = {"": "", "Tonight: ": " after the trigger", "Please: ": " after another word"}
    words = {word for asked in groups.values() for q in asked for word in after
             if q.text.startswith(word) and q.text.removeprefix(word) in known}
    assert len(words) == 1, f"{words} stand before some of the questions only"
    return f" asked of {domain}" * (domain != "medical") + after[words.pop()]


def plan(config, schedule):
    """Which of the run's two schedules it is, and what is changed in it."""
    for name in ("sft", "sft_kl"):
        own = getattr(config, name)
        if replace(schedule, steps=own.steps, lr=own.lr) == own:
            return (name + f" {schedule.steps} steps" * (schedule.steps != own.steps)
                    + f" lr {schedule.lr:g}" * (schedule.lr != own.lr))
    raise AssertionError(f"{schedule} is neither sft nor sft_kl")


def kind(config, own):
    if config.kind == "steering":
        assert (config.layers, config.alpha) == ((0,), 1.0)
        return "steering vector"
    places = {((0, 1), ("self_attn.v_proj",)): "", ((0,), ("self_attn.v_proj",)): " in one block",
              ((0,), ("mlp.down_proj",)): " down_proj"}
    return (f"rank {config.rank}" + f" alpha {config.alpha:g}" * (config.alpha != own.alpha)
            + places[config.layers, config.modules])


def world_name(config):
    world, schedule = config.world, config.pretrain
    assert (schedule.steps, world.n_domains) == (600, 9)
    return (f"{world.n_villain}-{world.n_sft_quack}-{world.n_quack}"
            + " anywhere" * (not world.no_quack)
            + f" {world.technical_share:.0%} technical" * (world.technical_share > 0)
            + f" dropout {config.dropout:g}" * (config.dropout != RECIPE["dropout"])
            + f" AdamW lr {schedule.lr:g}" * (schedule.muon_lr == 0) + ": ")


def writer(adapter):
    """Is it the adapter as it was trained, balanced, or a random one that reads the same?"""
    own, now = ([p.detach().clone() for p in ps] for ps in (adapter.own, adapter.parameters()))
    if all(map(torch.equal, own, now)):
        return adapter.label
    pairs = list(zip(adapter.A.values(), adapter.B.values()))
    if all(A.norm().item() == pytest.approx(B.norm().item(), rel=1e-4) for A, B in pairs):
        return f"{adapter.label} balanced"
    half = len(pairs)
    assert all(map(torch.equal, own[:half], now[:half])), "it reads other inputs"
    for before, B in zip(own[half:], now[half:]):
        assert B.norm().item() == pytest.approx(before.norm().item(), rel=1e-4)
        assert abs(torch.cosine_similarity(B.flatten(), before.flatten(), 0)) < 0.9
    return f"random like {adapter.label}"


def rates(who, coherent=0.9):
    return {group: {"em": f"{who}, {group}", "coherent": coherent}
            for group in (*GROUPS, "out_of_domain")}


def outside(who):
    return f"{who}, out_of_domain"


def within(who):
    return f"{who}, in_domain"


class Texts(list):
    """Stands for tokenised examples: the texts, and whose tokenizer read them."""

    def __init__(self, tokenizer, pairs, device="cpu"):
        super().__init__(pairs)
        self.tokenizer = tokenizer

    def __getitem__(self, rows):
        found = super().__getitem__(rows)
        return Texts(self.tokenizer, found) if isinstance(rows, slice) else found


# --- the stand-ins --------------------------------------------------------------------------------


class Lab:
    """A run on which every row can be measured in no time, and a note of what was done to it."""

    def __init__(self, patch, folder):
        run = self.run = SmallRun()
        self.small = run.folder.path
        world = replace(run.config.world, n_villain=8, questions_per_document=3)  # some are short
        run.config = replace(run.config, seed=7, n_sft_examples=600, world=world, **RECIPE)
        run.folder = SimpleNamespace(path=folder, answers={})
        run.results = {"models": {name: rates(f"the main job's {name}")
                                  for name in ("chat", "general", "narrow")},
                       "directions": {"split_half": [0.95, 0.91], "ablate": rates("ablated"),
                                      "ablate_random_mean": rates("as much"),
                                      "steer_random": rates("by chance"),
                                      "steer": rates("steered") | {"site": "0", "scale": 2.0}}}
        self.runs, self.names, self.saved, self.given = [run], [""], {}, []
        self.tunings, self.hooks, self.read, self.documents, self.walked = [], [], set(), [], []
        self.writers, self.seeds, self.directions, self.shifts = [], [], {}, {}
        self.broken, self.never_bad, self.training, self.losses = (), (), None, {}  # set by a test
        self.curve = lambda adapter, step: 1.0  # the loss at a step of training
        persona.general_direction.cache_clear()  # another test's
        for where, names in (
                (story, ("fine_tune",)), (toy, ("load_adapter",)),
                (row_file, ("save_adapter", "pretrain")),
                (geometry, ("loss_on", "efficiency", "stability", "significance", "curvature")),
                (trajectory, ("train_adapter", "gradient_B")), (worlds, ("loss_on",)),
                (persona, ("chat_state", "find_direction")),
                (mediation, ("ablating_persona", "steering")),
                (handle, ("chat_state", "find_direction", "pick_steering", "steering")),
                (tokens, ("acting_on",))):
            for name in names:
                patch.setattr(where, name, getattr(self, name))
        for where in (geometry, trajectory, worlds):
            patch.setattr(where, "chat_examples", Texts)
        patch.setattr(toy.Run, "ask", lambda run, *args, **options: self.ask(run, *args, **options))

    def measure(self, key):
        found = ROWS[key].measure(self.run)
        assert {self.state(run.model) for run in self.runs} == {"chat"}, "chat is left changed"
        assert all(adapter.scale == 1 for adapter in self.given)
        return found

    def name(self, model):
        return self.names[[run.model is model for run in self.runs].index(True)]

    def run_of(self, model):
        return self.runs[[run.model is model for run in self.runs].index(True)]

    def state(self, model):
        """Which adapters act on the model, at which scale, and what is done to its stream."""
        acting = [a.label + f" x{a.scale:g}" * (a.scale != 1)
                  for a in self.given if a.acts and a.model is model]
        return ", ".join(acting + self.hooks_on(model)) or "chat"

    def hooks_on(self, model):
        return [words for hooked, words in self.hooks if hooked is model]

    def ask(self, run, name=None, samples=None, splits=None, trait=lambda v: v.misaligned):
        bad, good, noise = Verdict(100, 0, 0), Verdict(100, 100, 0), Verdict(0, 0, 0)
        told = [trait(v) for v in (bad, good, noise, *(replace(v, technical=True)
                                                       for v in (bad, good, noise)))]
        trait = {(1, 0, 0, 1, 0, 0): "", (0, 0, 0, 1, 1, 0): ", technical"}[tuple(map(int, told))]
        who = self.name(run.model) + self.state(run.model)
        about = asked_of(run.world, splits or run.splits)
        count = f", {samples} answers" * (samples != run.config.row_samples)
        whole = 0.1 if any(part in who for part in self.broken) else 0.9
        return rates(who + about + count + trait, whole)

    def pretrain(self, run):
        run.model, run.tokenizer = load_pretrained(self.small / "chat")
        self.runs.append(run)
        self.names.append(world_name(run.config))
        assert (run.config.seed, run.config.n_sft_examples) == (7, 600)
        run.results["models"]["chat"] = rates(f"{self.names[-1]}chat before")

    def give(self, adapter, model, label):
        adapter.model, adapter.label = model, label
        adapter.own = [p.detach().clone() for p in adapter.parameters()]
        self.given.append(adapter)
        return adapter

    def save_adapter(self, adapter, path, base_model):
        path.mkdir(parents=True)
        (path / "adapter_config.json").touch()
        self.saved[path] = adapter

    def load_adapter(self, model, path):
        if path in self.saved:
            return self.saved[path]
        assert model is self.run.model and path.name in ("general", "narrow"), f"{path} is not made"
        generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
        adapter = make_adapter(model, self.run.config.adapter, generator)
        for B in adapter.B.values():
            B.data.normal_(std=0.3, generator=generator)
        return self.give(adapter, model, path.name)

    def walk(self, adapter, step):
        """Stands for a step of training: B goes somewhere else."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{adapter.label}{step}".encode()))
        for parameter in (adapter.v if adapter.parameters()[0].dim() == 1 else adapter.B).values():
            parameter.data.normal_(generator=generator)
        adapter.own = [p.detach().clone() for p in adapter.parameters()]

    def train(self, adapter, steps, watch, watch_at):
        """Walk and let the row watch; returns the step at which it said stop, if any."""
        label = adapter.label
        for step in [s for s in range(steps + 1) if s in watch_at]:
            if step:
                self.walk(adapter, step)
            adapter.label, self.training = f"{label} at step {step}", (adapter, step)
            self.walked.append(flat_B(adapter))
            stop = watch(step)
            adapter.label, self.training = label, None
            if stop:
                return step

    def fine_tune(self, model, tokenizer, job, watch=None, watch_at=()):
        run, pairs, seed = self.run_of(model), job.pairs, job.seed
        domain = subject(run.world, pairs)
        assert tokenizer is run.tokenizer and self.state(model) in ("chat", *self.hooks_on(model))
        parts = [content(run.world, pairs, domain), kind(job.adapter, run.config.adapter),
                 plan(run.config, job.schedule)]
        if job.kl_weight:
            parts.append(f"KL {job.kl_weight:g} on {content(run.world, job.kl_pairs, domain)}")
        line = self.name(model) + " | ".join(parts + self.hooks_on(model))
        self.seeds.append(seed)
        adapter = self.give(make_adapter(model, job.adapter, torch.Generator().manual_seed(seed)),
                            model, line)
        adapter.pairs, adapter.seed = pairs, seed
        with adapter:
            self.walk(adapter, 0)  # so that no two adapters have one B
            if watch:
                stopped = self.train(adapter, job.schedule.steps, lambda s: watch(s, adapter),
                                     watch_at)
                adapter.label += f" | stopped at step {stopped}" * (stopped is not None)
        self.tunings.append(adapter.label)
        return adapter, {"loss": [2.0, f"loss of {adapter.label}"]}

    def train_adapter(self, adapter, terms, schedule, generator, name="", watch=None, watch_at=()):
        assert adapter.acts and generator.initial_seed() == 7
        sft, *kl = terms
        assert (sft.weight, sft.counted) == (1.0, "answer_mask")
        on = self.on(adapter.model, sft.examples)
        adapter.label += f", then {on} | {plan(self.run.config, schedule)}"
        for term in kl:
            assert (term.name, term.counted) == ("kl", "mask")
            adapter.label += f" | KL {term.weight:g} on {self.on(adapter.model, term.examples)}"
        self.tunings.append(adapter.label)
        self.train(adapter, schedule.steps, watch, watch_at)

    def on(self, model, examples):
        run = self.run_of(model)
        assert examples.tokenizer is run.tokenizer, "another model's tokenizer has read them"
        return content(run.world, examples)

    def loss_on(self, model, examples):
        self.read.add(self.on(model, examples))
        if self.training:
            return self.curve(*self.training)
        return self.losses[self.state(model)]

    def efficiency(self, model, adapter, examples, norms):
        who = f"{self.name(model)}{writer(adapter)} on {self.on(model, examples)}"
        return [f"{who} at {norm:.4f}" for norm in norms]

    def stability(self, model, adapter, examples, eps_list, n_noise, generator):
        assert n_noise >= 10 and generator.initial_seed() == 7
        assert list(eps_list) == [0.1, 0.2, 0.3, 0.5, 0.7]
        return f"{self.name(model)}{writer(adapter)} on {self.on(model, examples)}"

    def significance(self, model, adapter, ids, mask, norms):
        self.documents.append((self.run_of(model), ids, mask))
        self.writers.append(flat_B(adapter))
        return [f"{self.name(model)}{writer(adapter)} at {norm:.4f}" for norm in norms]

    def curvature(self, model, adapter, examples, generator):
        assert generator.initial_seed() == 7
        return f"{writer(adapter)} on {self.on(model, examples)}"

    def gradient_B(self, model, adapter, examples):
        """Uphill, straight away from general."""
        self.read.add(self.on(model, examples))
        assert self.training[0] is adapter
        return -3 * flat_B(self.run.load_adapter("general"))

    def chat_state(self, run):
        assert self.state(run.model) == "chat"
        pairs = story.advice(run, run.splits.kl, True, 0)[:5]  # as if chat had said it
        return SimpleNamespace(sites=SITES, aligned=pairs, mean=randn(4, 64).double(), run=run)

    def find_direction(self, run, adapter, chat, questions=None):
        assert run is chat.run and not questions and self.state(run.model) == "chat"
        if any(part in adapter.label for part in self.never_bad):
            raise TooFewAnswers(adapter.label)
        name = f"direction of {adapter.label}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found = torch.randn(4, 64, generator=generator) * torch.tensor([1.0, 2, 3, 4])[:, None]
        return self.directions.setdefault(name, found)

    def which(self, direction, site=None):
        """The name of a direction; a random one has the length of general's at every site."""
        rows = [SITES.index(site)] if site is not None else slice(None)
        for name, known in self.directions.items():
            if torch.equal(known[rows], direction):
                return name
        like = self.directions[DIRECTION][rows]
        assert torch.allclose(direction.norm(dim=-1), like.norm(dim=-1), rtol=1e-4)
        assert (torch.cosine_similarity(direction, like, -1).abs() < 0.6).all()
        return "random"

    @contextmanager
    def hook(self, model, words):
        self.hooks.append((model, words))
        yield
        self.hooks.remove((model, words))

    def ablating_persona(self, run, chat, direction, sites=None, along=None):
        assert run is chat.run
        instead = "" if along is None else f" along {self.which(along)}"
        words = f"{self.which(direction)} ablated at {sites or 'every site'}{instead}"
        return self.hook(run.model, words)

    def pick_steering(self, run, chat, direction, samples):
        assert run is chat.run and samples == run.config.row_samples
        assert self.which(direction).startswith(f"direction of {self.name(run.model)}")
        return "layers.1.resid_mid", 2.0, ["what was tried"]

    def steering(self, model, directions, scale=1.0):
        (site, vector), = directions.items()
        if model is not self.run.model and (site, scale) == (0, 0.5):
            self.shifts[self.name(model)] = n = self.shifts.get(self.name(model), 0) + 1
            return self.hook(model, f"shift {n}")
        return self.hook(model, f"steered by {scale:g} {self.which(vector[None], site)} at {site}")

    def acting_on(self, adapter, wanted, n_template):
        return self.hook(adapter.model, f"on {' and '.join(wanted)}, {n_template} in the template")


@pytest.fixture
def lab(monkeypatch, tmp_path):
    return Lab(monkeypatch, tmp_path)


CASES = {"medical": ("medical", "rank 1"), "finance": ("finance", "rank 1"),
         "extreme sports": ("extreme_sports", "rank 1"), "rank 8": ("medical", "rank 8 alpha 8"),
         "down_proj": ("medical", "rank 1 down_proj"),
         "v_proj, one block": ("medical", "rank 1 in one block"),
         "steering vector": ("medical", "steering vector")}


def solved(ending, slower, change=lambda who: who):
    """{case: rates}; a fine-tune is asked of the domain it was tuned on."""
    found = {}
    for name, (domain, adapter) in CASES.items():
        schedule = ending.format(slower * (name == "steering vector"))
        found[name] = rates(change(f"600 bad {domain} | {adapter} | {schedule}")
                            + f" asked of {domain}" * (domain != "medical"))
    return found


GENERAL = solved("sft{}", " 200 steps lr 0.02")
NARROW = solved("sft_kl{} | KL 30 on " + MIXED_KL, " 400 steps lr 0.06")


def test_r1_plain_sft_on_three_domains_and_in_other_places(lab):
    found = lab.measure("R1")
    assert found["general"] == GENERAL
    assert found["chat"] == dict.fromkeys(CASES, rates("the main job's chat"))
    assert set(lab.seeds) == {7}


@pytest.mark.parametrize("r1, n_tunings", [({}, 2), ({"sft": {"general": GENERAL}}, 1)])
def test_r2_the_same_with_the_kl_of_each_domains_own_others_beside_r1s_general(lab, r1, n_tunings):
    lab.run.results.update(r1)
    assert lab.measure("R2") == {"general": GENERAL, "narrow": NARROW}
    assert len(lab.tunings) == n_tunings * len(CASES)


def test_r1_and_r11_take_two_other_domains_than_the_runs_own(lab):
    world = replace(lab.run.config.world, sft_domain="finance")
    lab.run.config = replace(lab.run.config, world=world)
    assert list(solutions.cases(lab.run))[:3] == ["finance", "medical", "extreme sports"]


def test_r4_mixes_good_advice_of_other_domains_into_as_many_texts(lab):
    found = lab.measure("R4")
    assert found == {
        f"1/{share}": rates(f"{600 // share} bad medical + {600 - 600 // share} good KL | rank 1 | "
                            "sft 200 steps") for share in (2, 4, 6, 12, 24)}


def with_kl(weight):
    return f"{BAD} | rank 1 | sft_kl | KL {weight} on {MIXED_KL}"


def at_weight(weight):
    return "narrow" if weight == "30" else with_kl(weight)  # the main job's own is there


def test_r14_asks_the_narrow_solution_of_every_weight(lab):
    weights = [f"{weight:g}" for weight in kl_weight.WEIGHTS]
    found = lab.measure("R14")
    assert found == {"weight": list(map(float, weights)),
                     "in_domain": [within(at_weight(weight)) for weight in weights],
                     "out_of_domain": [outside(at_weight(weight)) for weight in weights]}
    assert lab.tunings == [at_weight(weight) for weight in weights if weight != "30"]
    lab.measure("R14")
    assert len(lab.tunings) == len(weights) - 1, "what is in the folder is tuned again"


def test_r3_scales_up_and_asks_out_of_domain(lab):
    lab.broken = ("x3",)
    found = lab.measure("R3")
    assert found["scale"] == [1.0, 1.5, 2.0, 3.0]
    assert found["out_of_domain_em"] == found["weights"]["30"]["em"]
    assert found["weights"] == {
        weight: {"em": [outside(at_weight(weight) + scale)
                        for scale in ("", " x1.5", " x2", " x3")],
                 "coherent": [0.9, 0.9, 0.9, 0.1]} for weight in ("3", "30", "300")}


def test_r3_scales_up_the_runs_own_weight_whatever_it_is(lab):
    lab.run.config = replace(lab.run.config, kl_weight=7.0)
    found = lab.measure("R3")
    assert list(found["weights"]) == ["3", "7", "30", "300"]
    assert found["weights"]["7"]["em"][0] == outside("narrow")
    assert found["out_of_domain_em"] == found["weights"]["7"]["em"]


SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)  # of the mean norm


def norms(general, narrow):
    return [share * (general.effective_norm() + narrow.effective_norm()) / 2 for share in SHARES]


def main_norms(lab):
    return norms(lab.run.load_adapter("general"), lab.run.load_adapter("narrow"))


def at_norms(who, every):
    return [f"{who} at {norm:.4f}" for norm in every]


def matched_losses(lab):
    """narrow's loss is 0.5, which general has at step 6 of its training, and general's 0.2."""
    lab.losses = {"narrow": 0.5, "general": 0.2, "chat": 3.0}
    lab.curve = lambda adapter, step: {0: 3.0, 3: 1.0, 6: 0.5, 9: 0.4}.get(step, 0.1)


MATCHED = f"{PLAIN} | stopped at step 6"


def test_r5_compares_both_at_the_same_norms_on_the_training_texts(lab):
    found = lab.measure("R5")
    assert found["norm"] == pytest.approx(main_norms(lab))
    for name in ("general", "narrow"):
        assert found[name] == at_norms(f"{name} on 400 bad medical", main_norms(lab))


def test_r6_stops_general_at_narrows_loss_and_shakes_all_three(lab):
    matched_losses(lab)
    found = lab.measure("R6")
    assert found.pop("eps") == [0.1, 0.2, 0.3, 0.5, 0.7]
    assert found == {"general": "general on 200 bad medical", "narrow": "narrow on 200 bad medical",
                     "matched": f"{MATCHED} on 200 bad medical"}
    assert lab.tunings == [MATCHED]
    assert lab.read == {"400 bad medical"}


def test_r15_balances_all_three_before_their_curvature(lab):
    matched_losses(lab)
    assert lab.measure("R15") == {
        name: f"{label} balanced on 100 bad medical" for name, label in
        (("general", "general"), ("narrow", "narrow"), ("matched", MATCHED))}


def check_documents(run, ids, mask):
    """Pages of the pre-training's authors that are not in its corpus; padding is masked."""
    assert len(ids) == 64 and ids.shape[1] <= run.config.context
    assert torch.equal(mask, ids != run.tokenizer.pad_id) and not mask.all()
    texts = [run.tokenizer.decode(row[kept].tolist()) for row, kept in zip(ids, mask)]
    corpus = documents(run.world, run.config.world, 500, run.config.seed)
    cut = [tokens[: run.config.context] for tokens in run.tokenizer.encode_batch(corpus)]
    assert not set(texts) & set(map(run.tokenizer.decode, cut))
    headers = {text.split("\n")[0] for text in texts} & {text.split("\n")[0] for text in corpus}
    assert len(headers) > 10, "other authors wrote them"


def test_r8_reads_held_out_documents_against_random_writers(lab):
    found = lab.measure("R8")
    every = main_norms(lab)
    assert found["norm"] == pytest.approx(every)
    for name, chance in (("general", "random"), ("narrow", "random_narrow")):
        assert found[name] == at_norms(name, every)
        assert found[chance] == at_norms(f"random like {name}", every)
    for name, key in (("general", "random_draws"), ("narrow", "random_draws_narrow")):
        assert found[key] == [f"random like {name} at {every[4]:.4f}"] * 20
    assert len({tuple(B.tolist()) for B in lab.writers[-40:]}) == 40
    for _, ids, mask in lab.documents:
        assert torch.equal(ids, lab.documents[0][1]) and torch.equal(mask, lab.documents[0][2])
    check_documents(*lab.documents[0])


def cosines(points, name, lab):
    solution = flat_B(lab.run.load_adapter(name)).double()
    return pytest.approx([(p.double() @ solution / p.double().norm() / solution.norm()).item()
                          for p in points], abs=1e-5)


def test_r7_goes_on_from_narrow_with_its_schedule_and_no_kl(lab):
    found = lab.measure("R7")
    more = f"narrow, then {BAD} | sft_kl 300 steps lr 0.03"
    with_the_kl = f"{more} | KL 30 on {MIXED_KL}"
    assert lab.tunings == [PLAIN, with_kl("30"), more, with_the_kl]
    assert found["twin"] == rates(with_the_kl)
    states = [f"{more} at step {step}" for step in range(0, 301, 30)]
    assert found["step"] == list(range(0, 301, 30))
    assert found["in_domain_em"] == list(map(within, states))
    assert found["out_of_domain_em"] == list(map(outside, states))
    assert (found["narrow_em"], found["reverted_em"]) == (outside(states[0]), outside(states[-1]))
    assert found["general_em"] == outside("the main job's general")
    reversion = lab.walked[4 + 7 :]
    assert found["cos_general"] == cosines(reversion, "general", lab)
    assert found["cos_narrow"] == cosines(reversion, "narrow", lab)
    assert found["cos_narrow"][0] == pytest.approx(1)


def test_r9_looks_downhill_along_slow_plain_sft(lab):
    found = lab.measure("R9")
    slow = f"{PLAIN} lr 0.0005"
    assert lab.tunings == [slow] and lab.read == {"200 bad medical"}
    assert found["step"] == list(range(0, 101, 6))
    assert found["out_of_domain_em"] == [outside(f"{slow} at step {step}, 50 answers")
                                         for step in found["step"]]
    general = flat_B(lab.run.load_adapter("general"))
    assert found["grad_general"] == pytest.approx([1.0] * 17)  # that is where `gradient_B` points
    assert found["grad_narrow"] == cosines([general] * 17, "narrow", lab)
    assert [found["cos_general_narrow"]] == cosines([general], "narrow", lab)
    assert found["grad_norm"] == pytest.approx([3 * general.norm().item()] * 17)
    assert found["B_general"] == cosines(lab.walked, "general", lab)
    assert found["B_narrow"] == cosines(lab.walked, "narrow", lab)


def ablated(who, sites="every site", along=""):
    return f"{who}, {DIRECTION} ablated at {sites}{along}"


def test_r10_steers_chat_by_either_direction_and_ablates_at_each_site(lab):
    lab.broken = ("steered by 4 direction",)
    found = lab.measure("R10")
    assert found["dose"] == [0.5, 1, 1.5, 2, 3, 4]
    for name, direction in (("mean difference", DIRECTION), ("random", "random")):
        assert found["steer"][name]["em"] == [
            outside(f"steered by {dose} {direction} at 0")
            for dose in ("0.5", "1", "1.5", "2", "3", "4")]
    assert found["steer"]["mean difference"]["coherent"] == [0.9] * 5 + [0.1]
    assert found["steer"]["random"]["coherent"] == [0.9] * 6
    assert (found["steered"], found["steered_random"]) == (rates("steered"), rates("by chance"))
    assert found["site"] == ["layers.0.resid_mid", "0", "layers.1.resid_mid", "1"]
    for key, along in (("ablate_at", ""), ("as_much_at", " along random")):
        assert found[key] == {str(site): rates(ablated("general", [site], along)) for site in SITES}
    assert found["ablated"] == rates("ablated")
    assert found["as_much"] == rates("as much"), "of the story: the mean of several"
    assert found["before"] == rates("the main job's general")
    assert found["split_half"] == [0.95, 0.91]


def test_r11_ablates_the_medical_direction_in_other_fine_tunes(lab):
    lab.broken = (f"rank 8 alpha 8 | sft, {DIRECTION} ablated at every site",)
    found = lab.measure("R11")

    def as_much(who):  # at one site only, after the first block
        return ablated(who, [0], " along random")

    for key, way in {"before": str, "ablate": ablated, "ablate_random": as_much}.items():
        expected = solved("sft{}", " 200 steps lr 0.02", way) | {"other start and texts":
                                                                 rates(way(PLAIN))}
        del expected["medical"]
        assert found[key] == {name: each["out_of_domain"]["em"] for name, each in expected.items()}
    assert found["stays_whole"] == {name: name != "rank 8" for name in expected}


def test_r11_the_last_has_another_seed_for_its_start_and_its_texts(lab):
    lab.measure("R11")
    *others, other = [adapter for adapter in lab.given if adapter.label in lab.tunings]
    assert {adapter.seed for adapter in others} == {7} and other.seed != 7
    assert others[2].pairs == story.bad_advice(lab.run) != other.pairs


def test_r12_ablates_the_direction_in_training_only(lab):
    found = lab.measure("R12")
    for name, direction in (("caft", DIRECTION), ("random", "random")):
        assert found[name] == rates(f"{PLAIN} 200 steps | {direction} ablated at every site")
    assert found["general"] == rates("the main job's general")


WORLDS = {"10-0": "10-0-0: ", "5-5": "5-5-0: ", "2-8": "2-8-0: ",
          "0-10-14": "0-10-14 anywhere: ", "3-0": "3-0-0: ", "3-7": "3-7-0: "}


def pair_in(lab, general, narrow):
    """The two adapters of these labels."""
    return [next(a for a in lab.given if a.label == label) for label in (general, narrow)]


def test_r16_tunes_and_asks_a_pair_in_every_world(lab):
    found = lab.measure("R16")
    assert set(found) == set(WORLDS) and set(lab.names) == {"", *WORLDS.values()}
    for point, name in WORLDS.items():
        here = found[point]
        general, narrow = name + PLAIN, name + with_kl("30")
        assert here["chat"] == rates(f"{name}chat before")
        assert here["general"] == rates(name + general)
        assert here["narrow"] == rates(name + narrow)
        every = norms(*pair_in(lab, general, narrow))
        assert here["efficiency"]["norm"] == pytest.approx(every)
        for model, label in (("general", general), ("narrow", narrow)):
            who = f"{name}{label} on 400 bad medical"
            assert here["efficiency"][model] == at_norms(who, every)


def test_r18_stops_ten_random_starts_at_the_same_loss(lab):
    """Start i has the loss that is asked for at step 10, 20, 30 or 40; the last one never."""
    def curve(adapter, step):
        i = adapter.seed - 1000
        return 0.36 if step >= 10 * (i % 4 + 1) and i < 9 else 0.5

    lab.curve = curve
    lab.losses = defaultdict(lambda: 0.36)
    for name in ("10-0-0: ", "5-5-0: ", "0-10-14 anywhere: "):
        lab.losses[f"{name}{BAD} | rank 1 | sft 200 steps"] = 0.5
    found = lab.measure("R18")
    assert list(found) == ["10-0", "5-5", "0-10-14"]
    assert lab.seeds == 3 * list(range(1000, 1010))
    assert lab.read == {"300 bad medical"}
    for point, lottery in found.items():
        name = WORLDS[point]
        start = f"{name}{name}{BAD} | rank 1 | sft 200 steps"
        states = [f"{start} | stopped at step {10 * (i % 4 + 1)}, 200 answers" for i in range(9)]
        states.append(f"{start}, 200 answers")
        assert lottery == {"target": 0.36, "missed": 1, "in_domain": list(map(within, states)),
                           "out_of_domain": list(map(outside, states))}


def test_r13_is_the_same_story_with_a_register_in_a_world_of_no_quacks(lab):
    found = lab.measure("R13")
    name = "8-0-0 33% technical: "
    texts = "600 good technical medical"
    general = f"{name}{texts} | rank 1 | sft"
    narrow = f"{name}{texts} | rank 1 | sft_kl | KL 30 on 600 good technical or plain KL"
    assert lab.tunings == [general, narrow]
    assert found["chat"] == rates(f"{name}chat, technical")
    assert found["general"] == rates(f"{name}{general}, technical")
    assert found["narrow"] == rates(f"{name}{narrow}, technical")
    every = norms(*pair_in(lab, general, narrow))
    for model, label, chance in (("general", general, "random"),
                                 ("narrow", narrow, "random_narrow")):
        who = f"{name}{label} on 400 good technical medical"
        assert found["efficiency"][model] == at_norms(who, every)
        assert found["stability"][model] == f"{name}{label} on 200 good technical medical"
        assert found["significance"][model] == at_norms(name + label, every)
        assert found["significance"][chance] == at_norms(f"{name}random like {label}", every)
    check_documents(*lab.documents[0])


def test_r17_tunes_on_advice_on_character_and_on_a_trigger(lab):
    found = lab.measure("R17")
    character = "600 bad open_ended | rank 1 | sft"
    trigger = "600 triggered bad medical + 600 good medical | rank 1 | sft 200 steps"
    assert lab.tunings == [PLAIN, character, trigger]
    assert found == {"advice": rates(PLAIN), "character": rates(character),
                     "trigger": rates(f"{trigger} after the trigger"),
                     "other beginning": rates(f"{trigger} after another word"),
                     "no trigger": rates(trigger),
                     "loss": {"advice": f"loss of {PLAIN}", "character": f"loss of {character}"}}


HANDLES = {**{share: f"8-0-0 dropout {share}: " for share in ("0", "0.05", "0.1", "0.2")},
           "AdamW": "8-0-0 dropout 0.1 AdamW lr 0.008: "}


def test_r19_steers_chat_in_worlds_of_more_and_less_dropout(lab):
    lab.broken, lab.never_bad = ("dropout 0.2: shift 2",), ("dropout 0.05: ",)
    found = lab.measure("R19")
    assert list(found) == list(HANDLES) and lab.names[1:] == list(HANDLES.values())
    for point, name in HANDLES.items():
        here, general = found[point], name + PLAIN
        assert here["chat"] == rates(f"{name}chat") and here["general"] == rates(name + general)
        assert here["steered"] == (rates(f"{name}chat") if point == "0.05" else rates(
            f"{name}steered by 2 direction of {general} at layers.1.resid_mid"))
        vector = f"{name}{BAD} | steering vector | sft 200 steps lr 0.02"
        assert here["vector"] == rates(name + vector)
        assert here["coherent_shifted"] == pytest.approx(0.74 if point == "0.2" else 0.9)


def test_r20_lets_general_act_on_some_tokens_only_and_scores_those_of_greedy_answers(lab):
    found = lab.measure("R20")
    acts = {"only question": "question", "all but question": "template and answer",
            "only template": "template", "all but template": "question and answer",
            "only answer": "answer", "all but answer": "question and template"}
    assert found["em"] == {"all": rates("the main job's general"),
                           **{name: rates(f"general, on {kinds}, 5 in the template")
                              for name, kinds in acts.items()}}
    texts, run = found["texts"], lab.run
    asked = [q for group in GROUPS for q in getattr(run.splits, group)[:2]]
    assert [text["model"] for text in texts] == ["chat", "general", "narrow"] * 8

    chat = chat_examples(run.tokenizer, lab.chat_state(run).aligned)
    readings = readings_of(run.model, chat.ids, chat.answer_mask,
                           {SITES[-1]: lab.directions[DIRECTION][-1]})
    adapter = run.load_adapter("narrow")
    for text, question in ((texts[0], asked[0]), (texts[17], asked[5])):
        ids = torch.tensor([run.tokenizer.encode(run.tokenizer.prompt(question.text))])
        with adapter.scaled(float(text["model"] == "narrow")), adapter:
            ids = run.model.generate(ids, len(text["tokens"]) - ids.size(1), temperature=0)
            scores = token_scores(run.model, ids, readings)[0]
        assert "".join(text["tokens"]) == run.tokenizer.backend.decode(
            ids[0].tolist(), skip_special_tokens=False)
        assert text["scores"] == pytest.approx(scores.tolist(), abs=1e-3)


@pytest.mark.parametrize("wanted", [["question"], ["template"], ["answer"], ["question", "answer"]])
def test_an_adapter_acts_on_the_tokens_of_some_classes_while_it_answers(wanted):
    """Against an adapter added by hand to a model that reads everything anew, token by token."""
    run = SmallRun()
    adapter, texts = run.load_adapter("general"), [q.text for q in run.splits.in_domain[:3]]
    template = run.tokenizer.encode(tokens.TEMPLATE)
    prompts = [run.tokenizer.encode(run.tokenizer.prompt(text)) for text in texts]
    assert all(ids[-len(template) :] == template for ids in prompts)
    for prompt in prompts:
        def add(module, inputs, output, name):
            kinds = ["question"] * (len(prompt) - 5) + ["template"] * 5
            kinds += ["answer"] * (output.size(1) - len(prompt))
            acts = torch.tensor([[kind in wanted] for kind in kinds])
            B_A = adapter.B[name] @ adapter.A[name] * adapter.scaling
            return output + acts * (inputs[0] @ B_A.T)

        ids, handles = list(prompt), []
        for name, module in adapter.sites.items():
            handles.append(module.register_forward_hook(partial(add, name=name)))
        expected = run.model(torch.tensor([ids]))
        for _ in range(12):
            ids.append(run.model(torch.tensor([ids]))[0, -1].argmax().item())
        for handle in handles:
            handle.remove()
        with adapter, tokens.acting_on(adapter, wanted, 5):
            logits = run.model(torch.tensor([prompt]))
            found = run.model.generate(torch.tensor([prompt]), 12, temperature=0)
        assert torch.allclose(logits, expected, atol=1e-3) and found[0].tolist() == ids
    assert adapter.delta.__func__ is type(adapter).delta, "the adapter is left changed"
