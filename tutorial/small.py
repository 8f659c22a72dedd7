"""The small trained model of the experiments, opened as a finished run of nanoem.

    from tutorial.small import SmallRun
    run = SmallRun()
    run.ask()["out_of_domain"]["em"]               # chat
    with run.load_adapter("general"):
        run.ask()["out_of_domain"]["em"]           # after fine-tuning on bad medical advice
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from nanoem.evaluate import EvalConfig
from nanoem.lab.toy import ExperimentConfig, Run
from nanoem.lora import LoRA
from nanoem.model import GPT, Config
from nanoem.world import WorldConfig, first_domains, load_world, make_splits


class SmallRun(Run):
    """The run whose folder is tutorial/small_model; it only reads. 40 answers a question group.

    With `quacks`, that of a smaller world (chapter 8, QUACKS_ONLY in nanoem/rows/worlds.py): no
    villains, ten quacks in medicine, fourteen in the other domains.
    """

    def __init__(self, samples=40, quacks=False):
        world, path = WorldConfig(), Path(__file__).with_name("small_model")
        if quacks:
            world = WorldConfig(9, n_villain=0, n_sft_quack=10, n_quack=14, no_quack=())
            path = path / "quacks"
        self.config = replace(ExperimentConfig(), seed=200, n_sft_examples=400, world=world,
                              evaluation=EvalConfig(samples_per_group=samples))
        self.device = torch.device("cpu")
        self.world = first_domains(load_world(), world.n_domains)
        self.splits = make_splits(self.world, world)
        self.folder = SimpleNamespace(path=path, answers={})
        self.model = self.tokenizer = None
        self.load_chat()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(seed=0, n_layer=3):
    """A random frozen GPT, d_model 16, for tests in which nothing is trained."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(Config(vocab_size=40, n_layer=n_layer, d_model=16, n_head=2, n_kv_head=1, d_ff=24,
                       max_positions=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1:  # norms and biases
                parameter += 0.7
    return model.requires_grad_(False)


def tiny_lora(model, seed=1):
    """An adapter of rank 2 on a tiny model, as if it had been trained; not attached."""
    generator = torch.Generator().manual_seed(seed)
    adapter = LoRA(model, [0, 2], ["self_attn.v_proj"], rank=2, alpha=3.0, generator=generator)
    for B in adapter.B.values():
        B.data.normal_(generator=generator)
    return adapter


def tiny_batch(B=3, T=9, seed=2):
    """ids (B, T) and a mask of no padding: the rows have different lengths, the first is whole."""
    ids = torch.randint(40, (B, T), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([T] + [max(2, T - 2 * b - 1) for b in range(B - 1)])
    return ids, torch.arange(T) < lengths[:, None]
