"""Capture: tokens a second by backend, and what the early exit saves."""

import pandas as pd
import torch

from probe.backends import make_capture
from probe.capture import capturing
from probe.models import load_language_model
from probe.sites import parse_site
from tests.bench.timing import side_by_side

SEQUENCES, CONTEXT = 8, 128
SITE = parse_site("resid_post.12")


def measure() -> pd.DataFrame:
    """SmolLM2 in float32 at one middle site, by every backend."""
    model = load_language_model("smollm2", dtype="float32")
    tokens = torch.randint(100, 40_000, (SEQUENCES, CONTEXT))
    lens = make_capture(model, [SITE], "transformer_lens")
    nnsight = make_capture(model, [SITE], "nnsight")

    @torch.no_grad()
    def native(early_exit: bool) -> None:
        with capturing(model, [SITE], early_exit=early_exit):
            model.run(tokens)

    with torch.no_grad():
        table = side_by_side(
            {
                "native, whole forward pass": lambda: native(False),
                "native, early exit": lambda: native(True),
                "TransformerLens": lambda: lens(tokens),
                "nnsight": lambda: nnsight(tokens),
            },
            SEQUENCES * CONTEXT,
            "tokens",
        )
    half = load_language_model("smollm2", dtype="bfloat16")

    @torch.no_grad()
    def in_half() -> None:
        with capturing(half, [SITE]):
            half.run(tokens)

    precision = side_by_side(
        {"native, float32": lambda: native(True), "native, bfloat16": in_half},
        SEQUENCES * CONTEXT,
        "tokens",
    )
    return pd.concat([table, precision], ignore_index=True)
