"""Does the break last? Fine-tuning after it, conversations before the request, soft tokens.

Fine-tuning moves all weights of a copy (AdamW): on ordinary passages, which say nothing of the
concept, or on passages on the concept. The original fine-tuned likewise says how much of what
comes back is learned rather than restored.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch

from analyses.circuit_breakers.asking import Ask, answer_loss
from analyses.circuit_breakers.capability import response_pairs
from analyses.circuit_breakers.rows import TokenRow
from probe.language import LanguageModel

TUNING_LR, TUNING_BATCH = 1e-4, 4
"""Of AdamW; at 2e-5, a usual rate for larger models, ten steps hardly move SmolLM2-135M."""
Text = Literal["ordinary", "concept"]


def tuned_curve(
    model: LanguageModel,
    text: Sequence[TokenRow],
    judged: Sequence[TokenRow],
    budgets: Sequence[int],
    *,
    seed: int,
    say: Callable[[int], None] = lambda _: None,
) -> pd.DataFrame:
    """The judged responses' likelihood after so many steps of fine-tuning: `steps`, `row`, `nll`.

    Args:
        model: what is tuned; a copy of it.
        text: rows to be tuned on; only responses count in the loss.
        judged: rows whose responses are judged.
        budgets: steps after which is looked, ascending; 0 is the model itself.
        seed: decides the draws.
        say: called with 1 after each step.
    """
    tuned = LanguageModel(model.spec, copy.deepcopy(model.model), model.tokenizer)
    tuned.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(tuned.model.parameters(), lr=TUNING_LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = response_pairs(judged)
    own = list(zip(*response_pairs(text), strict=True))
    tables = []
    for step in range(max(budgets) + 1):
        if step:
            chosen = torch.randint(len(own), (TUNING_BATCH,), generator=generator).tolist()
            loss = answer_loss(tuned, [own[n] for n in chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            say(1)
        if step in budgets:
            nll = Ask(model=tuned).nll(prompts, responses)
            tables.append(pd.DataFrame({"steps": step, "row": np.arange(len(nll)), "nll": nll}))
    return pd.concat(tables)
