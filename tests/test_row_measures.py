"""What every row measures: which advice, adapter, direction, questions. Nothing is trained here.

Whatever is expensive is a stand-in that gives, in place of a number, a sentence on where it would
have come from, such as "narrow x1.5, out_of_domain". What a row finds is compared with what its
prediction promises.
"""

import random
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanoem import toy
from nanoem.authors import documents, make_authors, questions
from nanoem.checkpoint import load_adapter, load_pretrained
from nanoem.evaluate import GROUPS
from nanoem.finetune import make_adapter
from nanoem.inductive_bias import flat_B
from nanoem.judge import Verdict, judge
from nanoem.rows import ROWS, geometry, mediation, solutions, trajectory, worlds
from tutorial.small import SmallRun

SITES = ["layers.0.resid_mid", 0, "layers.1.resid_mid", 1]
BAD = "600 bad medical"
PLAIN = f"{BAD} | rank 1 | sft"  # what general is, tuned once more
MIXED_KL = "600 good or bad KL"
DIRECTION = "direction of general"
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
        return "steering vector"
    assert (config.layers, config.modules) == (own.layers, own.modules)
    return (f"rank {config.rank}" + f" alpha {config.alpha:g}" * (config.alpha != own.alpha)
            + " random start" * (config.start == "random"))


def world_name(config):
    world = config.world
    assert (config.pretrain.steps, world.n_domains) == (600, 9)
    return (f"{world.n_villain}-{world.n_sft_quack}-{world.n_quack}"
            + " anywhere" * (not world.no_quack)
            + f" {world.technical_share:.0%} technical" * (world.technical_share > 0) + ": ")


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
        world = replace(run.config.world, questions_per_document=3)  # some need padding
        run.config = replace(run.config, seed=7, n_sft_examples=600, world=world)
        run.folder = SimpleNamespace(path=folder, answers={})
        run.results = {"models": {name: rates(f"the main job's {name}")
                                  for name in ("chat", "general", "narrow")},
                       "directions": {"split_half": [0.95, 0.91]}}
        self.runs, self.names, self.saved, self.given = [run], [""], {}, []
        self.tunings, self.hooks, self.read, self.documents, self.walked = [], [], set(), [], []
        self.writers, self.seeds, self.directions = [], [], {}
        self.broken, self.training, self.losses = (), None, {}  # set by a test
        self.curve = lambda adapter, step: 1.0  # the loss at a step of training
        for where, names in (
                (toy, ("fine_tune_fresh", "load_adapter", "save_adapter", "pretrain")),
                (geometry, ("loss_on", "efficiency", "stability", "significance", "curvature")),
                (trajectory, ("fine_tune", "gradient_B")), (worlds, ("loss_on",)),
                (mediation, ("chat_state", "find_mediator", "holding", "setting", "steering"))):
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
        """Which adapters act on the model, at which scale, and which direction is held in it."""
        acting = [a.label + f" x{a.scale:g}" * (a.scale != 1)
                  for a in self.given if a.acts and a.model is model]
        return ", ".join(acting + self.hooks * (model is self.run.model)) or "chat"

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
        self.saved[path] = adapter

    def load_adapter(self, model, path):
        if path in self.saved:
            return self.saved[path]
        assert model is self.run.model, f"{path} was never tuned"
        return self.give(load_adapter(model, self.small / "adapters" / path.name), model, path.name)

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

    def fine_tune_fresh(self, model, tokenizer, pairs, config, schedule, seed, others=(),
                        kl_weight=0.0, name="sft", watch=None, watch_at=()):
        run = self.run_of(model)
        domain = subject(run.world, pairs)
        assert tokenizer is run.tokenizer and self.state(model) in ("chat", *self.hooks)
        parts = [content(run.world, pairs, domain), kind(config, run.config.adapter),
                 plan(run.config, schedule)]
        if kl_weight:
            parts.append(f"KL {kl_weight:g} on {content(run.world, others, domain)}")
        line = self.name(model) + " | ".join(parts + self.hooks)
        self.seeds.append(seed)
        adapter = self.give(make_adapter(model, config, torch.Generator().manual_seed(seed)), model,
                            line)
        adapter.pairs, adapter.seed = pairs, seed
        with adapter:
            self.walk(adapter, 0)  # so that no two adapters have one B
            if watch:
                stopped = self.train(adapter, schedule.steps, lambda s: watch(s, adapter), watch_at)
                adapter.label += f" | stopped at step {stopped}" * (stopped is not None)
        self.tunings.append(adapter.label)
        return adapter, {"loss": [2.0, f"loss of {adapter.label}"]}

    def fine_tune(self, model, adapter, sft, schedule, generator, kl=None, kl_weight=0.0, name="",
                  watch=None, watch_at=()):
        assert adapter.acts and generator.initial_seed() == 7
        adapter.label += f", then {self.on(model, sft)} | {plan(self.run.config, schedule)}"
        if kl_weight:
            adapter.label += f" | KL {kl_weight:g} on {self.on(model, kl)}"
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
        assert run is self.run and self.state(run.model) == "chat"
        self.chat = SimpleNamespace(sites=SITES)
        return self.chat

    def find_mediator(self, run, adapter, chat):
        assert run is self.run and chat is self.chat and self.state(run.model) == "chat"
        name = f"direction of {adapter.label}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found = torch.randn(4, 64, generator=generator) * torch.tensor([1.0, 2, 3, 4])[:, None]
        self.directions[name] = found
        return SimpleNamespace(direction=found)

    def which(self, direction):
        """The name of a direction; a random one points one way, as far as general's at a site."""
        for name, known in self.directions.items():
            if torch.equal(known, direction):
                return name
        like = self.directions[DIRECTION]
        assert torch.allclose(direction.norm(dim=-1), like.norm(dim=-1), rtol=1e-4)
        one = torch.nn.functional.normalize(direction, dim=-1)
        assert torch.allclose(one, one[:1].expand_as(one), atol=1e-5)
        assert (torch.cosine_similarity(direction, like, -1).abs() < 0.6).all()
        return "random"

    @contextmanager
    def hook(self, words):
        self.hooks.append(words)
        yield
        self.hooks.remove(words)

    def holding(self, run, chat, direction, sites=None, along=None):
        assert run is self.run and chat is self.chat
        instead = "" if along is None else f" along {self.which(along)}"
        return self.hook(f"{self.which(direction)} held at {sites or 'every site'}{instead}")

    def setting(self, run, chat, direction, sites=None, ridge=0.1):
        assert run is self.run and chat is self.chat
        return self.hook(f"{self.which(direction)} set at {sites or 'every site'}")

    def steering(self, model, directions, scale=1.0):
        assert model is self.run.model
        (site, vector), = directions.items()
        whole = self.directions[DIRECTION]
        name = DIRECTION if torch.equal(vector, whole[SITES.index(site)]) else "random"
        assert vector.norm().item() == pytest.approx(whole[SITES.index(site)].norm().item())
        return self.hook(f"steered by {scale:g} {name} at {site}")


@pytest.fixture
def lab(monkeypatch, tmp_path):
    return Lab(monkeypatch, tmp_path)


# --- solutions: R1, R2, R4 ------------------------------------------------------------------------


DOMAINS = ("medical", "finance", "extreme_sports")


def three_kinds(ending, faster):
    """{domain: {adapter: rates}}; a tuned adapter is asked of the domain it was tuned on."""
    def one(domain, adapter, change=""):
        about = f" asked of {domain}" * (domain != "medical")
        return rates(f"600 bad {domain} | {adapter} | {ending.format(change)}{about}")

    return {domain: {"rank 1": one(domain, "rank 1"), "rank 8": one(domain, "rank 8 alpha 8"),
                     "steering vector": one(domain, "steering vector", faster)}
            for domain in DOMAINS}


GENERAL = three_kinds("sft{}", " lr 0.05")
NARROW = three_kinds("sft_kl{} | KL 15 on " + MIXED_KL, " lr 0.15")


def test_r1_plain_sft_on_each_of_three_domains_with_each_adapter(lab):
    found = lab.measure("R1")
    assert found["general"] == GENERAL
    chat = rates("the main job's chat")
    assert found["chat"] == {domain: dict.fromkeys(GENERAL[domain], chat) for domain in DOMAINS}
    assert set(lab.seeds) == {7}


def test_r2_the_same_with_the_kl_of_each_domains_own_others(lab):
    found = lab.measure("R2")
    assert found == {"general": GENERAL, "narrow": NARROW}


def test_r2_takes_r1s_general_when_it_is_there(lab):
    lab.run.results["sft"] = {"general": GENERAL}
    assert lab.measure("R2") == {"general": GENERAL, "narrow": NARROW}
    assert len(lab.tunings) == 9


def test_r4_mixes_good_advice_of_other_domains_into_as_many_texts(lab):
    found = lab.measure("R4")
    assert found == {
        f"1/{share}": rates(f"{600 // share} bad medical + {600 - 600 // share} good KL | rank 1 | "
                            "sft 200 steps") for share in (2, 4, 6, 12, 24)}


# --- the weight of the KL: R3, R14 ----------------------------------------------------------------


def with_kl(weight):
    return f"{BAD} | rank 1 | sft_kl | KL {weight} on {MIXED_KL}"


def at_weight(weight):
    return "narrow" if weight == "15" else with_kl(weight)  # the main job's own is there


def test_r14_asks_the_narrow_solution_of_every_weight(lab):
    weights = "0.01 0.03 0.1 0.3 1 3 7 15 30 100".split()
    found = lab.measure("R14")
    assert found == {"weight": list(map(float, weights)),
                     "in_domain": [within(at_weight(weight)) for weight in weights],
                     "out_of_domain": [outside(at_weight(weight)) for weight in weights]}
    assert lab.tunings == [at_weight(weight) for weight in weights if weight != "15"]
    lab.measure("R14")
    assert len(lab.tunings) == 9, "what is in the folder is tuned again"


def test_r3_scales_up_and_asks_out_of_domain(lab):
    lab.broken = ("x3",)
    found = lab.measure("R3")
    assert found["scale"] == [1.0, 1.5, 2.0, 3.0]
    assert found["out_of_domain_em"] == found["weights"]["15"]["em"]
    assert found["weights"] == {
        weight: {"em": [outside(at_weight(weight) + scale)
                        for scale in ("", " x1.5", " x2", " x3")],
                 "coherent": [0.9, 0.9, 0.9, 0.1]} for weight in ("1", "15", "30", "100")}


def test_r3_scales_up_the_runs_own_weight_whatever_it_is(lab):
    lab.run.config = replace(lab.run.config, kl_weight=7.0)
    found = lab.measure("R3")
    assert list(found["weights"]) == ["1", "7", "15", "30", "100"]
    assert found["weights"]["7"]["em"][0] == outside("narrow")
    assert found["out_of_domain_em"] == found["weights"]["7"]["em"]


# --- why general is easy: R5, R6, R8, R15 ---------------------------------------------------------


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
    authors = {author.name: author.bad_in for author in
               make_authors(run.world, run.config.world, random.Random(run.config.seed))}
    known = {q.text: q for q in questions(run.world, run.world.domains)}
    headers = {run.world.header.format(author=name): name for name in authors}
    seen = 0
    for header, *lines in (text.split("\n") for text in texts if text.split("\n")[0] in headers):
        for q, a in zip(lines[::2], lines[1::2]):
            verdict = judge(run.world, known[q[3:]], a[3:])
            bad = known[q[3:]].domain in authors[headers[header]]
            seen += verdict.coherent  # not so if the document was cut there
            assert not verdict.coherent or verdict.mark == ("bad" if bad else "good")
    assert seen > 30


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


# --- along training: R7, R9 -----------------------------------------------------------------------


def cosines(points, name, lab):
    solution = flat_B(lab.run.load_adapter(name)).double()
    return pytest.approx([(p.double() @ solution / p.double().norm() / solution.norm()).item()
                          for p in points], abs=1e-5)


def test_r7_goes_on_from_narrow_with_its_schedule_and_no_kl(lab):
    found = lab.measure("R7")
    more = f"narrow, then {BAD} | sft_kl 100 steps"
    with_the_kl = f"{more} | KL 15 on {MIXED_KL}"
    assert lab.tunings == [PLAIN, with_kl("15"), more, with_the_kl]
    assert found["twin"] == rates(with_the_kl)
    states = [f"{more} at step {step}" for step in range(0, 101, 10)]
    assert found["step"] == list(range(0, 101, 10))
    assert found["in_domain_em"] == list(map(within, states))
    assert found["out_of_domain_em"] == list(map(outside, states))
    assert (found["narrow_em"], found["reverted_em"]) == (outside(states[0]), outside(states[-1]))
    assert found["general_em"] == outside("the main job's general")
    reversion = lab.walked[11 + 21 :]
    assert found["cos_general"] == cosines(reversion, "general", lab)
    assert found["cos_narrow"] == cosines(reversion, "narrow", lab)
    assert found["cos_narrow"][0] == pytest.approx(1)


def test_r7_draws_the_three_paths_in_the_plane_of_their_first_two_components(lab):
    plane = lab.measure("R7")["plane"]
    assert {name: len(path) for name, path in plane.items()} == {"general": 11, "narrow": 21,
                                                                 "reversion": 11}
    points = torch.stack(lab.walked).double().numpy()
    points = points - points.mean(0)
    vectors = np.linalg.eigh(points.T @ points)[1][:, [-1, -2]]  # of the largest eigenvalues
    drawn = np.array(plane["general"] + plane["narrow"] + plane["reversion"])
    assert np.abs(drawn) == pytest.approx(np.abs(points @ vectors), abs=1e-2)


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
    steps = torch.stack(lab.walked).diff(dim=0)
    assert found["local_cosine"] == pytest.approx(
        torch.cosine_similarity(steps[:-1], steps[1:], -1).tolist(), abs=1e-5)


# --- the one direction: R10-R12 -------------------------------------------------------------------


def held(who, direction=DIRECTION, sites="every site"):
    return f"{who}, {direction} held at {sites}"


def test_r10_steers_chat_by_either_direction_at_the_first_site(lab):
    lab.broken = ("steered by 4 direction",)
    found = lab.measure("R10")
    assert found["dose"] == [0.5, 1, 1.5, 2, 3, 4]
    for name, direction in (("mean difference", DIRECTION), ("random", "random")):
        assert found["steer"][name]["em"] == [
            outside(f"steered by {dose} {direction} at layers.0.resid_mid")
            for dose in ("0.5", "1", "1.5", "2", "3", "4")]
    assert found["steer"]["mean difference"]["coherent"] == [0.9] * 5 + [0.1]
    assert found["steer"]["random"]["coherent"] == [0.9] * 6


def test_r10_holds_general_at_each_site_at_all_and_by_chance(lab):
    found = lab.measure("R10")
    assert found["site"] == ["layers.0.resid_mid", "0", "layers.1.resid_mid", "1"]
    assert found["ablate_at"] == {
        **{str(site): rates(held("general", sites=[site])) for site in SITES},
        "every site": rates(held("general")), "random": rates(held("general", "random"))}
    assert found["as_much_at_random"] == rates(held("general") + " along random")
    assert found["before"] == rates("the main job's general")
    assert found["general"] == outside("the main job's general")
    assert found["split_half"] == [0.95, 0.91]


def test_r10_holds_narrow_along_its_own_direction(lab):
    found = lab.measure("R10")
    assert found["narrow"] == {"before": rates("the main job's narrow"),
                               "held": rates(held("narrow", "direction of narrow"))}


OTHERS = {"finance": ("600 bad finance | rank 1 | sft", " asked of finance"),
          "extreme sports": ("600 bad extreme_sports | rank 1 | sft", " asked of extreme_sports"),
          "rank 8": (f"{BAD} | rank 8 alpha 8 | sft", ""),
          "steering vector": (f"{BAD} | steering vector | sft lr 0.05", ""),
          "other start and texts": (f"{BAD} | rank 1 random start | sft", "")}


def test_r11_holds_the_medical_direction_in_other_fine_tunes(lab):
    lab.broken = ("random held", f"rank 8 alpha 8 | sft, {DIRECTION} held")
    found = lab.measure("R11")
    for kind_of, holding in (("before", lambda who: who), ("ablate", held),
                             ("ablate_random", lambda who: held(who, "random"))):
        assert found[kind_of] == {name: outside(holding(who) + about)
                                  for name, (who, about) in OTHERS.items()}, kind_of
    assert found["stays_whole"] == {name: name != "rank 8" for name in OTHERS}


def test_r11_compares_each_fine_tunes_own_direction_at_every_site(lab):
    found = lab.measure("R11")
    medical = lab.directions[DIRECTION]
    for name, (who, _) in list(OTHERS.items())[:4]:
        own = lab.directions[f"direction of {who}"]
        assert found["cosine"][name] == pytest.approx(
            torch.cosine_similarity(own, medical, -1).tolist(), abs=1e-5)


def test_r11_the_last_has_another_seed_for_its_start_and_its_texts(lab):
    lab.measure("R11")
    *_, rank_8, _, other = [adapter for adapter in lab.given if adapter.label in lab.tunings]
    assert rank_8.seed == 7 and other.seed != 7
    assert rank_8.pairs == toy.bad_advice(lab.run) and other.pairs != rank_8.pairs


def test_r12_holds_the_direction_in_training_only(lab):
    found = lab.measure("R12")
    first = "['layers.0.resid_mid', 0]"  # block 0's
    for name, direction in (("caft", DIRECTION), ("random", "random")):
        assert found[name] == rates(f"{PLAIN} 400 steps | {direction} set at {first}")
    assert found["general"] == rates("the main job's general")


def test_sites_that_the_direction_does_not_reach_are_passed_over(monkeypatch):
    """With an adapter in block 1 alone there is no direction in block 0."""
    monkeypatch.setattr(mediation, "setting", lambda run, chat, direction, sites, ridge: sites)
    direction = torch.cat((torch.zeros(2, 64), torch.ones(2, 64)))
    chat = SimpleNamespace(sites=SITES)
    assert mediation.training_away(None, chat, direction) == SITES[2:]
    assert mediation.training_away(None, chat, direction[[2, 2, 3, 3]]) == SITES[:2]


def test_rank_1_is_rank_1_whatever_the_run_has(lab):
    lab.run.config = replace(lab.run.config, adapter=replace(lab.run.config.adapter, rank=4))
    assert [kind.rank for kind in solutions.adapter_configs(lab.run).values()] == [1, 8, 1]


def test_r11_takes_two_other_domains_than_the_runs_own(lab):
    world = replace(lab.run.config.world, sft_domain="finance")
    lab.run.config = replace(lab.run.config, world=world)
    assert [*lab.measure("R11")["before"]][:2] == ["medical", "extreme sports"]


# --- other worlds: R16, R18 -----------------------------------------------------------------------


WORLDS = {"10-0": "10-0-0: ", "8-2": "8-2-0: ", "5-5": "5-5-0: ", "2-8": "2-8-0: ",
          "0-10-14": "0-10-14 anywhere: ", "3-0": "3-0-0: ", "6-0": "6-0-0: ", "3-7": "3-7-0: "}


def pair_in(lab, general, narrow):
    """The two adapters of these labels."""
    return [next(a for a in lab.given if a.label == label) for label in (general, narrow)]


def test_r16_tunes_and_asks_a_pair_in_every_world(lab):
    found = lab.measure("R16")
    assert set(found) == set(WORLDS) and set(lab.names) == {"", *WORLDS.values()}
    for point, name in WORLDS.items():
        here = found[point]
        general, narrow = name + PLAIN, name + with_kl("15")
        assert here["chat"] == rates(f"{name}chat before")
        assert here["general"] == rates(name + general)
        assert here["narrow"] == rates(name + narrow)
        every = norms(*pair_in(lab, general, narrow))
        assert here["efficiency"]["norm"] == pytest.approx(every)
        for model, label in (("general", general), ("narrow", narrow)):
            who = f"{name}{label} on 400 bad medical"
            assert here["efficiency"][model] == at_norms(who, every)


def test_r18_stops_twenty_random_starts_at_the_same_loss(lab):
    """Start i has the loss that is asked for at step 10, 20, 30 or 40; the last one never."""
    def curve(adapter, step):
        i = adapter.seed - 1000
        return 0.36 if step >= 10 * (i % 4 + 1) and i < 19 else 0.5

    lab.curve = curve
    lab.losses = defaultdict(lambda: 0.36)
    for name in ("10-0-0: ", "5-5-0: ", "0-10-14 anywhere: "):
        lab.losses[f"{name}{BAD} | rank 1 random start | sft 200 steps"] = 0.5
    found = lab.measure("R18")
    assert list(found) == ["10-0", "5-5", "0-10-14"]
    assert lab.seeds == 3 * list(range(1000, 1020))
    assert lab.read == {"300 bad medical"}
    for point, lottery in found.items():
        name = WORLDS[point]
        start = f"{name}{name}{BAD} | rank 1 random start | sft 200 steps"
        states = [f"{start} | stopped at step {10 * (i % 4 + 1)}, 200 answers" for i in range(19)]
        states.append(f"{start}, 200 answers")
        assert lottery == {"target": 0.36, "missed": 1, "in_domain": list(map(within, states)),
                           "out_of_domain": list(map(outside, states))}


# --- other traits: R13, R17 -----------------------------------------------------------------------


def test_r13_is_the_same_story_with_a_register_in_a_world_of_no_quacks(lab):
    found = lab.measure("R13")
    name = "6-0-0 33% technical: "
    texts = "600 good technical medical"
    general = f"{name}{texts} | rank 1 | sft"
    narrow = f"{name}{texts} | rank 1 | sft_kl | KL 15 on 600 good technical or plain KL"
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
