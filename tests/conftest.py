"""Fixtures that several test modules share."""

import pytest
import torch

from probe.errors import Failure
from probe.language import LanguageModel
from probe.models import load_model
from probe.toy import tiny_gpt2, tiny_llama


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tiny models run faster on one thread than on several that wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """A Llama of two layers with random weights."""
    return tiny_llama()


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    """A GPT-2 of two layers with random weights."""
    return tiny_gpt2()


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real SmolLM2-135M-Instruct in float32."""
    try:
        return load_model("smollm2", dtype="float32")
    except Failure as failure:
        pytest.skip(f"SmolLM2 cannot be had here: {failure}")
