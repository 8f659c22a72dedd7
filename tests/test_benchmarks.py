"""The benchmarks are not part of the suite; that peers.py says what it lacks is."""

import os
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "benchmarks" / "peers.py"


def test_without_its_peers_it_says_so_in_one_sentence(tmp_path):
    (tmp_path / "peft.py").write_text("raise ImportError('No module named peft')")
    done = subprocess.run([sys.executable, PEERS], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("peers.py: No module named peft; in a throwaway venv, pip install torch "
                           "numpy tokenizers transformers peft, and run it again\n")
