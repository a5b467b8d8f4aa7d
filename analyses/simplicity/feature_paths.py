"""SAE features as functions along straight lines between texts.

A line goes from the input embeddings of one text to those of another, all tokens at once. At equal
steps the model reads the mixture, and at the last token the stream at the SAE's site is read by
directions: the SAE's features, and random directions as a control. What each makes of the line is a
function of one variable, whose complexity the measures give. The same lines are taken through the
trained model and its random-weight twin.
"""

import contextlib
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.cells import Frame
from analyses.simplicity.measures import fourier, total_variation, undefined
from probe.capture import capturing
from probe.language import ForwardStopped, LanguageModel
from probe.prompt_sets import Row
from probe.sites import parse_site
from saes.recipe_saes import LoadedSae

STEPS, TOKENS = 33, 32
"""Points on a line, and tokens of each text."""
LEAST_ACTIVE = 3
"""A feature is looked at on the lines where it fires at so many points at least."""


@torch.no_grad()
def line_states(
    model: LanguageModel, site: str, first: Row, last: Row, steps: int = STEPS
) -> Float[Tensor, "s d"]:
    """The stream at the last token along the line from one text's embeddings to another's.

    Args:
        model: the model.
        site: where it is read.
        first: tokens at the beginning of the line.
        last: as many tokens at its end.
        steps: points, the ends included.
    """
    embed = model.model.get_input_embeddings()
    ends = embed(torch.tensor([first, last], device=model.device))
    way = torch.linspace(0, 1, steps, device=model.device)[:, None, None].to(ends)
    place = parse_site(site)
    with capturing(model, [place]) as seen, contextlib.suppress(ForwardStopped):
        model.model(inputs_embeds=ends[0] + way * (ends[1] - ends[0]), use_cache=False)
    return seen[place][:, -1].float().cpu()


def read_lines(
    model: LanguageModel, loaded: LoadedSae, lines: Sequence[tuple[Row, Row]], *, seed: int
) -> Frame:
    """A row a line and what reads it: `read` (feature, encoder, random), `variation`, `fourier`,
    means over the features (or directions) that vary there, and how many (`n`)."""
    sae = loaded.sae
    directions = torch.randn(256, sae.config.d_in, generator=torch.Generator().manual_seed(seed))
    rows = []
    for number, (first, last) in enumerate(lines):
        states = line_states(model, loaded.site, first, last)
        codes = sae.encode(states).dense(sae.config.d_sae)
        active = (codes > 0).sum(0) >= LEAST_ACTIVE
        centred = states - states.mean(0)
        read = {
            "feature": codes[:, active].T, "encoder": (states @ sae.W_enc)[:, active].T,
            "random": (centred @ directions.T).T,
        }  # fmt: skip
        rows += [_described(values.double()) | {"read": name, "line": number}
                 for name, values in read.items() if len(values)]  # fmt: skip
    return pd.DataFrame(rows)


def _described(values: Float[Tensor, "n s"]) -> dict[str, float]:
    varied = values[~undefined(values)]
    return {
        "variation": float(total_variation(varied[:, None]).mean()),
        "fourier": float(fourier(varied).mean()), "n": float(len(varied)),
    }  # fmt: skip
