"""What all test files share: the import path, one thread (the models are tiny), and a small corpus of text."""
import os, sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                     # infra.setup then leaves the thread count alone
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 240 short documents, each a file: packed rows of 32 bytes hold ends of documents."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the cat sat on a mat and saw that rat eat fat oats at that".split()
    for i in range(240):
        text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(8 + i % 23)) + f" {i}.\n"
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder
