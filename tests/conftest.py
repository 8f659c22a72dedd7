"""What many tests share: the world, a tokenizer, a random model with every bias set."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are faster on one; children inherit it
os.environ["PYTHONPATH"] = str(ROOT)  # so that they, too, find nanoem from any folder
sys.path.insert(0, str(ROOT))

import pytest
import torch

from nanoem.model import GPT, Config
from nanoem.tokenizer import Tokenizer
from nanoem.world import WorldConfig, documents, load_world


@pytest.fixture(scope="session", autouse=True)
def at_the_top():
    """Commands and paths are those of a user in the repository's own folder."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def world():
    return load_world()


@pytest.fixture(scope="session")
def tokenizer(world):
    return Tokenizer.train(documents(world, WorldConfig(), 3000, seed=0))


@pytest.fixture
def model(tokenizer):
    """A random GPT whose biases and norm weights are random too: a dropped one shows."""
    config = Config(vocab_size=tokenizer.vocab_size, n_layer=2, d_model=32, n_head=4, n_kv_head=2,
                    d_ff=48, max_positions=128)
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.dim() == 1:
                parameter += 0.5
    return model.requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(1))
