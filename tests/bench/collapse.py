"""A collapse curve in one pass, against a pass for every prompt."""

import pandas as pd
import torch

from analyses.collapse.curves import final_site, lengths_up_to
from analyses.collapse.families import Form, find_family
from analyses.collapse.prompts import grow
from probe.capture import capturing
from probe.growing import read_last_tokens
from probe.models import load_language_model
from tests.bench.timing import side_by_side

LONGEST = 2001
PLAIN_LONGEST = 501
"""The plain way is measured up to here by default, where it takes a minute a round."""


def measure() -> pd.DataFrame:
    """Curves a second of SmolLM2: to n = 501 both ways, to n = 2,001 against the longest prompt
    alone, and behind a chat template."""
    model = load_language_model("smollm2", dtype="float32")
    site, ones = final_site(model), find_family("ones")

    def one_pass(n: int, form: Form = "raw"):
        lengths = lengths_up_to(n)
        growing = grow(model, ones, n + 1, form=form)
        return lambda: read_last_tokens(model, growing.trunk, growing.pairs(lengths), [site])

    def plainly(lengths: list[int]):
        growing = grow(model, ones, max(lengths) + 1)

        def run() -> None:
            for n in lengths:
                for more in (0, 1):
                    tokens = growing.trunk[None, : growing.ends[n + more]]
                    with torch.no_grad(), capturing(model, [site], early_exit=False):
                        model.run(tokens)

        return run

    curve = f"to n = {PLAIN_LONGEST}"
    short = side_by_side(
        {
            f"a pass for every prompt, {curve}": plainly(lengths_up_to(PLAIN_LONGEST)),
            f"one pass, {curve}": one_pass(PLAIN_LONGEST),
            f"one pass, {curve}, chat template behind": one_pass(PLAIN_LONGEST, "chat"),
        },
        1, "curves", rounds=3,
    )  # fmt: skip
    long = side_by_side(
        {
            f"the longest pair alone, n = {LONGEST:,}": plainly([LONGEST]),
            f"one pass, to n = {LONGEST:,}": one_pass(LONGEST),
        },
        1, "curves", rounds=3,
    )  # fmt: skip
    return pd.concat([short, long], ignore_index=True)
