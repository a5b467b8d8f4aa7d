"""Steered generation against plain generation, and the lookup of a prompt, on SmolLM2."""

import contextlib
from collections.abc import Iterator

import pandas as pd
import torch

from probe.generation import GenerateConfig, generate, prompt_tokens
from probe.interventions import Coordinate, Edit, Op, Where
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.sites import parse_site
from saes.activations import TopK
from saes.constraints import initialise
from saes.models import SaeConfig, SparseAutoencoder
from saes.prompts import encode_prompt
from saes.recipe_saes import Reader
from tests.bench.timing import side_by_side

SITE = "resid_post.12"
PROMPT = "The lighthouse keeper wrote a letter to his sister in Lisbon every winter."
NEW_TOKENS = 64


def measure() -> pd.DataFrame:
    """Tokens a second of each way of generating, and prompts a second of the lookup."""
    model = load_language_model("smollm2")
    sae = made_sae(model)
    prompt = prompt_tokens(model, PROMPT)
    config = GenerateConfig(max_new_tokens=NEW_TOKENS)
    ways = {
        "plain generation": [],
        "a feature added": [feature_edit(sae, "add", len(prompt))],
        "a feature set (read at every token)": [feature_edit(sae, "set", len(prompt))],
    }
    with never_ending(model):
        table = side_by_side(
            {
                name: lambda edits=edits: generate(model, prompt, edits=edits, config=config)
                for name, edits in ways.items()
            },
            NEW_TOKENS,
            "tokens",
            rounds=5,
        )
    lookup = side_by_side(
        {"features of a prompt": lambda: encode_prompt(model, sae, SITE, PROMPT)},
        1,
        "tokens",
        rounds=5,
    )
    lookup["way"] = "features of a prompt (prompts a second)"
    return pd.concat([table, lookup], ignore_index=True)


@contextlib.contextmanager
def never_ending(model: LanguageModel) -> Iterator[None]:
    """Let the model write as many tokens as are asked for, whatever they are."""
    config = model.model.generation_config
    assert config is not None, "a causal language model has one"
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends


def made_sae(model: LanguageModel) -> SparseAutoencoder:
    """An untrained SAE of the demo's size: it costs what a trained one does."""
    sae = SparseAutoencoder(SaeConfig(d_in=model.d_model, d_sae=4608, activation=TopK(k=32)))
    generator = torch.Generator().manual_seed(0)
    initialise(sae, torch.randn(256, model.d_model, generator=generator), generator)
    return sae


def feature_edit(sae: SparseAutoencoder, op: Op, n_prompt: int) -> Edit:
    """A feature pushed at every token, gently enough for the text to go on."""
    reader = Reader(sae)
    return Edit(
        site=parse_site(SITE),
        component=Coordinate(vector=sae.W_dec[7].detach(), read=lambda x: reader.feature(7, x)),
        op=op,
        value=torch.tensor([5.0]),
        where=Where(prompt=torch.arange(n_prompt) > 0, steps=(1, None)),
    )
