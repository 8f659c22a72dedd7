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
from nanoem.toy import ExperimentConfig, Run
from nanoem.world import load_world, make_splits


class SmallRun(Run):
    """The run whose folder is tutorial/small_model; it only reads. 40 answers a question group."""

    def __init__(self, samples=40):
        self.config = replace(ExperimentConfig(), n_sft_examples=400,
                              evaluation=EvalConfig(samples_per_group=samples))
        self.device = torch.device("cpu")
        self.world = load_world()
        self.splits = make_splits(self.world, self.config.world)
        self.folder = SimpleNamespace(path=Path(__file__).with_name("small_model"), answers={})
        self.model = self.tokenizer = None
        self.load_chat()
