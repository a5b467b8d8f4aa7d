"""The dose-response study: its controls are of matched norm, its numbers those of a slow loop."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from artifact_tree import SITE, Tree

from analyses import dose_response
from analyses.dose_cells import (
    Candidate,
    costs,
    log_probabilities,
    make_candidates,
    next_tokens,
    openings,
    repetition,
    wanted_tokens,
)
from analyses.dose_findings import stands_out
from analyses.dose_measured import Config, Dosed
from probe.capture import capturing
from probe.errors import UserError
from probe.generation import prompt_tokens
from probe.interventions import applying
from probe.models import load_language_model
from probe.sites import parse_site
from saes.recipe_making import feature_recipe
from saes.recipes import Strength, write_recipe
from saes.steering import Steering, prepare

SMALL = Config(
    times=(0.5, 1.0), prompts=4, written=2, new_tokens=6, sequences=2, controls=3, device="cpu"
)


@pytest.fixture(scope="module")
def steering(browsed: Tree) -> Steering:
    model = load_language_model(browsed.sae.config["model"]["spec"], dtype="float32", device="cpu")
    recipe = feature_recipe(browsed.sae, 5, strength=Strength(value=20.0), name="five")
    return prepare(replace(recipe, effect=("s", "h")), root=browsed.root, model=model)


@pytest.fixture(scope="module")
def candidates(steering) -> list[Candidate]:
    twin = steering.saes["main"].sae
    return make_candidates(steering, SMALL, twin)


def test_every_kind_is_there_at_every_strength(candidates):
    found = pd.DataFrame([(c.kind, c.times) for c in candidates]).value_counts().to_dict()
    kinds = {"recipe": 1, "random direction": 3, "random feature": 3, "twin": 1}
    assert found == {(kind, t): n for kind, n in kinds.items() for t in (0.5, 1.0)}


def test_controls_change_the_activation_by_as_much(steering, candidates):
    tokens, site = prompt_tokens(steering.model, "Rain fell on the harbour"), parse_site(SITE)
    sizes = []
    for candidate in [None, *candidates]:
        edits = [] if candidate is None else candidate.edits(steering, tokens, 0)
        with (
            torch.no_grad(),
            applying(steering.model, edits),
            capturing(steering.model, [site]) as seen,
        ):
            steering.model.run(tokens[None])
        sizes.append(seen[site][0])
    for candidate, x in zip(candidates, sizes[1:], strict=True):
        change = (x - sizes[0]).norm(dim=-1)
        assert change[0] == 0
        length = steering.saes["main"].sae.W_dec[5].norm()
        expected = torch.full((len(tokens) - 1,), 20 * candidate.times * float(length))
        assert torch.allclose(change[1:], expected, rtol=1e-3), candidate


def test_effects_are_those_of_a_run_of_each(steering, candidates):
    tokens = prompt_tokens(steering.model, "Rain fell on the harbour")
    wanted = wanted_tokens(steering)
    together = next_tokens(steering, candidates, tokens, wanted, None)["tokens"]

    def odds(edits):
        p = steering.next_token(tokens, edits)[wanted].exp().sum()
        return torch.log(p / (1 - p))

    alone = [odds(c.edits(steering, tokens, 0)) - odds([]) for c in candidates]
    assert torch.allclose(together, torch.stack(alone), atol=1e-3)


def test_costs_are_those_of_the_definition(steering, candidates):
    number, found = next(iter(costs(steering, candidates, SMALL, lambda _: None)))
    assert number == 0
    tokens = next(openings_of_text(steering))
    clean = log_probabilities(steering, tokens, 1, [])[0].detach().double()
    for place in (0, 3, len(candidates) - 1):
        edits = candidates[place].edits(steering, tokens, 0)
        steered = log_probabilities(steering, tokens, 1, edits)[0].detach().double()
        kl = sum((p.exp() * (p - q)).sum() for p, q in zip(clean, steered, strict=True))
        assert float(found["kl"][place]) == pytest.approx(float(kl) / len(clean), rel=1e-3)
        rise = sum(
            clean[t, tokens[t + 1]] - steered[t, tokens[t + 1]] for t in range(len(tokens) - 1)
        )
        expected = float(rise) / len(clean)
        assert float(found["ce"][place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def openings_of_text(steering):
    from probe.corpora import token_batches

    for batch in token_batches(
        "builtin", steering.model, context=128, batch_sequences=1, max_tokens=128
    ):
        yield batch.tokens[0]


def test_openings_are_different_and_short(steering):
    found = openings(steering.model, 5)
    assert len(found) == 5 and len({tuple(one.tolist()) for one in found}) == 5


def test_repetition_counts_trigrams_seen_before():
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition([1, 2]) == 0 and repetition([]) == 0


def dosed(effect: float) -> Dosed:
    """A recipe whose effect on the tokens is larger than its controls' by `effect`."""
    rng, rows = np.random.default_rng(0), []
    for kind, n, mean in (("recipe", 1, 1 + effect), ("random direction", 4, 1), ("twin", 1, 0)):
        for control in range(n):
            rows += [
                {"kind": kind, "control": control, "times": 1.0, "measure": "tokens",
                 "unit": unit, "value": mean + 0.1 * rng.normal()}
                for unit in range(30)
            ]  # fmt: skip
    return Dosed(name="r", rows=pd.DataFrame(rows), samples=pd.DataFrame())


def test_a_recipe_stands_out_against_the_nearest_control_only():
    found = stands_out(dosed(0.5), "tokens")
    assert found.holds and found.value == pytest.approx(0.5, abs=0.05)
    assert "more than 5 of 5 controls; less the random directions" in found.statistic
    assert not stands_out(dosed(0.0), "tokens").holds
    assert not stands_out(dosed(-0.5), "tokens").holds


def test_the_study_writes_a_report_and_finds_it_again(browsed, steering, tmp_path):
    path, root = tmp_path / "five.json", tmp_path / "artifacts"
    write_recipe(steering.recipe, path)
    shutil.copytree(browsed.root, root)
    config = replace(SMALL, recipes=(str(path),), twin=browsed.sae.path.name)
    assert dose_response.estimate(config)["recipes"] == str(path)
    run = dose_response.run(config, root)
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert len(metrics["verdicts"]) == 3
    assert set(metrics["numbers"]) == {
        f"five/{m}" for m in ("tokens", "text", "kl", "ce", "repetition")
    }
    assert dose_response.run(config, root).path == run.path
    table = pd.read_parquet(next((run.path / "tables").glob("*every_dose.parquet")))
    assert len(table) == 5 * 4 * 2


def test_what_is_no_study_is_refused(browsed, tmp_path):
    with pytest.raises(UserError, match="no recipe was given"):
        dose_response.estimate(Config())
    with pytest.raises(UserError, match="--times must hold 1"):
        dose_response.estimate(replace(SMALL, recipes=("x",), times=(2.0,)))
    with pytest.raises(UserError, match="controls 2 or more"):
        dose_response.estimate(replace(SMALL, recipes=("x",), controls=1))
    with pytest.raises(UserError, match="there is no recipe"):
        dose_response.run(replace(SMALL, recipes=(str(tmp_path / "x.json"),)), browsed.root)
    with pytest.raises(UserError, match="there is no complete SAE 'nobody'"):
        dose_response.find_twin("nobody", browsed.root)


def test_an_effect_of_several_tokens_is_refused(steering):
    wrong = replace(steering, recipe=replace(steering.recipe, effect=("sea",)))
    with pytest.raises(UserError, match="is 3 tokens"):
        wanted_tokens(wrong)
