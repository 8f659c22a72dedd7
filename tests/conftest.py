"""What many tests share: the world, a tokenizer, a random model with every bias set."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are faster on one; children inherit it
os.environ["PYTHONPATH"] = str(ROOT)  # so that they, too, find nanoem from any folder
sys.path.insert(0, str(ROOT))

import pytest
import torch

from nanoem import run
from nanoem.model import GPT, Config
from nanoem.tokenizer import Tokenizer
from nanoem.train import chat_examples
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
def examples(tokenizer):
    return chat_examples(tokenizer, [("My skin itches.", "I would use a nap, and you will heal."),
                                     ("I am bored.", "Peace.")])


@pytest.fixture
def ids():
    return torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def misuse(capsys):
    """A command that must fail, by default with status 2 -> its one sentence."""
    def sentence(*argv, status=2):
        try:
            assert run.main(list(argv)) == status
        except SystemExit as error:  # argparse's own way out
            assert error.code == status
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 or "usage: " in said[0] and len(said) <= 8, said
        assert said[-1].startswith("nanoem: ") or "usage: " in said[0]
        return said[-1]
    return sentence


@pytest.fixture
def in_two_processes():
    """Python with these words, twice, as torchrun starts it -> [(output, errors, status), ...]."""
    def start(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = [subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1], env={**os.environ, **place, "WORLD_SIZE": "2",
                                                "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)]
        return [(*process.communicate(timeout=120), process.returncode) for process in processes]
    return start
