"""The measurements of the dose-response study: a recipe at a time, kept once measured.

All candidates of a recipe go through the model together, as rows of a batch that have edits of
their own (`probe.interventions.Edit.row`); row 0 is the model as it is.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from analyses.dose_measured import Config, Dosed, Kind, Measure
from probe.capture import capturing, site_width
from probe.corpora import read_documents, token_batches
from probe.directions import Direction
from probe.errors import Failure
from probe.generation import GenerateConfig, Generation, generate_rows, prompt_tokens
from probe.interventions import Edit, Turned, applying
from probe.language import LanguageModel
from probe.runs import Run, atomic_path
from probe.sites import parse_site
from probe.tokens import one_token, token_texts
from saes.models import SparseAutoencoder
from saes.recipe_saes import LoadedSae, Reader, newest_index
from saes.recipes import Feature, to_json
from saes.steering import Steering

CELL, SCHEMA = "dose_cell", 1
CONTEXT = 128
"""Tokens of a sequence of neutral text."""
OPENING_WORDS = 10
"""Words of a document's opening that a prompt has."""
ROWS_AT_ONCE = 16
"""Sequences of neutral text that go through the model together."""
ROWS, SAMPLES = "rows.parquet", "samples.parquet"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The recipe or a control at one strength."""

    kind: Kind
    """Which."""
    control: int
    """Number of the control; 0 for the recipe."""
    times: float
    """Multiple of the recipe's strengths."""
    directions: tuple[Float[Tensor, " d"], ...] | None
    """A direction of length 1 for each edit; None for the recipe's own."""

    def edits(self, steering: Steering, tokens: Int[Tensor, " t"], row: int) -> list[Edit]:
        """Its edits on a prompt, as a row of a batch."""
        edits = steering.edits(tokens, times=self.times, row=row)
        if self.directions is None:
            return edits
        return [
            replace(edit, component=turned(edit, direction))
            for edit, direction in zip(edits, self.directions, strict=True)
        ]


def turned(edit: Edit, direction: Float[Tensor, " d"]) -> Turned:
    """An edit's component with its change sent another way."""
    assert not isinstance(edit.component, Turned), "a recipe's edits are not turned"
    return Turned(component=edit.component, direction=direction)


def make_candidates(
    steering: Steering, config: Config, twin: SparseAutoencoder | None
) -> list[Candidate]:
    """The recipe and its controls at every strength."""
    widths = [site_width(steering.model, one.site) for one in steering.prepared]
    generator = torch.Generator().manual_seed(config.seed)
    chosen: dict[tuple[Kind, int], tuple[Tensor, ...] | None] = {("recipe", 0): None}
    for control in range(config.controls):
        chosen["random direction", control] = tuple(
            functional.normalize(torch.randn(width, generator=generator), dim=0) for width in widths
        )
    if (found := first_feature(steering)) is not None:
        feature, loaded = found
        same_width = {len(loaded.sae.W_dec[0])} == set(widths)
        others = living(loaded, feature, config.controls, generator) if same_width else []
        for control, other in enumerate(others):
            chosen["random feature", control] = _repeated(loaded.sae, other, len(widths))
        if twin is not None and same_width and feature < twin.config.d_sae:
            chosen["twin", 0] = _repeated(twin, feature, len(widths))
    return [
        Candidate(kind=kind, control=control, times=times, directions=directions)
        for times in config.times
        for (kind, control), directions in chosen.items()
    ]


def first_feature(steering: Steering) -> tuple[int, LoadedSae] | None:
    """The first feature that a recipe pushes, and its SAE; None where it pushes none."""
    for one in steering.prepared:
        if isinstance(one.edit.target, Feature):
            return one.edit.target.feature, steering.saes[one.edit.target.sae]
    return None


def living(loaded: LoadedSae, besides: int, n: int, generator: torch.Generator) -> list[int]:
    """Some features that fire, drawn; of an SAE without an index, any."""
    index = newest_index(loaded.run)
    numbers = list(range(loaded.sae.config.d_sae))
    if index is not None:
        frame = index.numbers()
        numbers = frame["feature"][frame["alive"]].tolist()
    numbers = [feature for feature in numbers if feature != besides]
    order = torch.randperm(len(numbers), generator=generator)[:n]
    return [int(numbers[i]) for i in order.tolist()]


def _repeated(sae: SparseAutoencoder, feature: int, n: int) -> tuple[Tensor, ...]:
    row = functional.normalize(sae.W_dec[feature].detach().float().cpu(), dim=0)
    return (row,) * n


# --------------------------------------------------------------------------------------- measuring


def measure_recipe(
    steering: Steering,
    config: Config,
    *,
    twin: SparseAutoencoder | None,
    probe: Direction | None,
    say: Say = lambda _: None,
) -> Dosed:
    """Measure a recipe and its controls at every strength.

    Args:
        steering: the recipe, ready to run.
        config: what to measure.
        twin: the SAE of the random-weight twin.
        probe: a direction to follow.
        say: told what is being done.

    Raises:
        UserError: the recipe's positions do not fit the openings that are gone on from.
        Failure: logits are not finite.
    """
    candidates = make_candidates(steering, config, twin)
    prompts = openings(steering.model, config.prompts)
    found: list[pd.DataFrame] = []
    wanted = wanted_tokens(steering)
    for unit, prompt in enumerate(prompts):
        say(f"prompt {unit + 1} of {len(prompts)}")
        values = next_tokens(steering, candidates, prompt, wanted, probe)
        found += [_frame(candidates, name, unit, value) for name, value in values.items()]
    samples = []
    for unit, prompt in enumerate(prompts[: config.written]):
        say(f"text {unit + 1} of {min(config.written, len(prompts))}")
        rows = write(steering, candidates, prompt, config)
        for name, value in of_written(steering, rows).items():
            found.append(_frame(candidates, name, unit, value))
        samples += _samples(steering, candidates, prompt, rows)
    for unit, values in costs(steering, candidates, config, say):
        found += [_frame(candidates, name, unit, value) for name, value in values.items()]
    return Dosed(
        name=steering.recipe.name,
        rows=pd.concat(found, ignore_index=True),
        samples=pd.DataFrame(samples),
    )


def _frame(
    candidates: Sequence[Candidate], measure: Measure, unit: int, values: Float[Tensor, " c"]
) -> pd.DataFrame:
    if not torch.isfinite(values).all():
        raise Failure("the model gave NaN or infinite logits; try smaller strengths.")
    return pd.DataFrame(
        {
            "kind": [one.kind for one in candidates],
            "control": [one.control for one in candidates],
            "times": [one.times for one in candidates],
            "measure": measure,
            "unit": unit,
            "value": values.double().numpy(),
        }
    )


def openings(model: LanguageModel, n: int) -> list[Int[Tensor, " t"]]:
    """The first words of documents of the built-in corpus, as prompts."""
    words = (document.text.split()[:OPENING_WORDS] for document in read_documents("builtin"))
    texts = map(" ".join, words)
    long = (text for text in texts if len(text.split()) == OPENING_WORDS)
    return [prompt_tokens(model, text) for text in itertools.islice(dict.fromkeys(long), n)]


def wanted_tokens(steering: Steering) -> Int[Tensor, " n"]:
    """The ids of the tokens that the recipe is meant to make likelier; empty where it says none.

    Raises `UserError` where one is not a token of the model.
    """
    ids = [one_token(steering.model, text) for text in steering.recipe.effect]
    return torch.tensor(ids, dtype=torch.long)


@torch.no_grad()
def next_tokens(
    steering: Steering,
    candidates: Sequence[Candidate],
    prompt: Int[Tensor, " t"],
    wanted: Int[Tensor, " n"],
    probe: Direction | None,
) -> dict[Measure, Float[Tensor, " c"]]:
    """Effects at the end of a prompt, by candidate: `tokens` and `probe`, as far as asked for."""
    model = steering.model
    rows = prompt[None].expand(len(candidates) + 1, -1)
    edits = _all_edits(steering, candidates, prompt)
    found: dict[Measure, Tensor] = {}
    sites = [] if probe is None else [probe.site]
    with applying(model, edits), capturing(model, sites, early_exit=False) as seen:
        logits = model.run(rows)
    assert logits is not None, "no early exit"
    if len(wanted):
        log_p = logits[:, -1].float().cpu().log_softmax(-1)
        inside = log_p[:, wanted].logsumexp(-1)
        odds = inside - torch.log1p(-inside.exp().clamp(max=1 - 1e-6))
        found["tokens"] = odds[1:] - odds[0]
    if probe is not None:
        projected = seen[probe.site][:, -1].float().cpu() @ probe.unit
        found["probe"] = projected[1:] - projected[0]
    return found


def _all_edits(
    steering: Steering, candidates: Sequence[Candidate], tokens: Int[Tensor, " t"]
) -> list[Edit]:
    return [
        edit
        for row, candidate in enumerate(candidates, 1)
        for edit in candidate.edits(steering, tokens, row)
    ]


def write(
    steering: Steering,
    candidates: Sequence[Candidate],
    prompt: Int[Tensor, " t"],
    config: Config,
) -> list[Generation]:
    """What the unsteered model and each candidate write, greedily."""
    return generate_rows(
        steering.model,
        prompt,
        len(candidates) + 1,
        edits=_all_edits(steering, candidates, prompt),
        config=GenerateConfig(max_new_tokens=config.new_tokens),
    )


@torch.no_grad()
def of_written(
    steering: Steering, rows: Sequence[Generation]
) -> dict[Measure, Float[Tensor, " c"]]:
    """What written texts are like: `repetition`, and `text` where the recipe has a feature."""
    repeated = torch.tensor([repetition(row.tokens.tolist()) for row in rows[1:]])
    found: dict[Measure, Tensor] = {"repetition": repeated}
    if (feature := first_feature(steering)) is not None:
        codes = torch.tensor([_mean_code(steering, row, *feature) for row in rows])
        found["text"] = codes[1:] - codes[0]
    return found


def repetition(tokens: Sequence[int]) -> float:
    """Share of a text's trigrams that were there before; 0 for fewer than two."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _mean_code(steering: Steering, row: Generation, feature: int, loaded: LoadedSae) -> float:
    """The feature's mean code on what was written, read in the unsteered model."""
    if not len(row.tokens):
        return 0.0
    whole, site = torch.cat([row.prompt, row.tokens])[None], parse_site(loaded.site)
    with capturing(steering.model, [site]) as seen:
        steering.model.run(whole)
    code = Reader(loaded.sae).feature(feature, seen[site])
    return float(code[0, len(row.prompt) :].mean())


def _samples(
    steering: Steering,
    candidates: Sequence[Candidate],
    prompt: Int[Tensor, " t"],
    rows: Sequence[Generation],
) -> Iterator[dict[str, Any]]:
    text = "".join(token_texts(steering.model, prompt[1:].tolist()))
    yield {"prompt": text, "times": 0.0, "text": rows[0].text}
    for candidate, row in zip(candidates, rows[1:], strict=True):
        if candidate.kind == "recipe":
            yield {"prompt": text, "times": candidate.times, "text": row.text}


def costs(
    steering: Steering, candidates: Sequence[Candidate], config: Config, say: Say
) -> Iterator[tuple[int, dict[Measure, Float[Tensor, " c"]]]]:
    """KL and rise of cross-entropy on neutral text, by candidate, sequence by sequence."""
    batches = token_batches(
        "builtin", steering.model, context=CONTEXT, batch_sequences=1,
        max_tokens=CONTEXT * config.sequences,
    )  # fmt: skip
    for number, batch in enumerate(batches):
        say(f"neutral text {number + 1} of {config.sequences}")
        tokens = batch.tokens[0]
        clean = log_probabilities(steering, tokens, 1, [])[0]
        kl, ce = [], []
        for start in range(0, len(candidates), ROWS_AT_ONCE):
            some = candidates[start : start + ROWS_AT_ONCE]
            edits = [
                edit
                for row, candidate in enumerate(some)
                for edit in candidate.edits(steering, tokens, row)
            ]
            for steered in log_probabilities(steering, tokens, len(some), edits):
                kl.append((clean.exp() * (clean - steered)).sum(-1).mean())
                ce.append((clean - steered).gather(-1, tokens[1:, None]).mean())
        yield number, {"kl": torch.stack(kl), "ce": torch.stack(ce)}


@torch.no_grad()
def log_probabilities(
    steering: Steering, tokens: Int[Tensor, " t"], n_rows: int, edits: Sequence[Edit]
) -> list[Float[Tensor, "u v"]]:
    """Of each row of a batch of one text, the predictions of its tokens but the first; float32."""
    with applying(steering.model, edits):
        logits = steering.model.run(tokens[None].expand(n_rows, -1))
    assert logits is not None, "no capture is active, so the pass ran to its end"
    return [row[:-1].float().cpu().log_softmax(-1) for row in logits]


# -------------------------------------------------------------------------------------------- kept


def measured_once(
    steering: Steering,
    config: Config,
    root: Path,
    *,
    twin: LoadedSae | None,
    probe: Direction | None,
    say: Say,
) -> Dosed:
    """A recipe's measurements, from `<root>/tasks` where they are there already."""
    asked = {
        "kind": CELL,
        "schema": SCHEMA,
        "recipe": to_json(steering.recipe),
        "dtype": str(steering.model.dtype),
        "twin": None if twin is None else twin.run.path.name,
        "probe": None if probe is None else probe.vector.tolist(),
    }
    numbers = ("times", "prompts", "written", "new_tokens", "sequences", "controls", "seed")
    asked |= {name: _plain(getattr(config, name)) for name in numbers}
    folder = Run.create(root / "tasks", "dose", asked)
    with folder.lock():
        if not folder.complete:
            made = measure_recipe(
                steering, config, twin=None if twin is None else twin.sae, probe=probe, say=say
            )
            for name, table in ((ROWS, made.rows), (SAMPLES, made.samples)):
                with atomic_path(folder.path / name) as temporary:
                    table.to_parquet(temporary)
            folder.finish(
                summary={"recipe": made.name}, inputs={}, seeds={"controls": config.seed},
                device=str(steering.model.device),
            )  # fmt: skip
    return Dosed(
        name=steering.recipe.name,
        rows=pd.read_parquet(folder.path / ROWS),
        samples=pd.read_parquet(folder.path / SAMPLES),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
