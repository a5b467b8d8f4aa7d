"""The parts of the collapse study as cells: what is measured together, and kept.

Each function measures one cell's tables; `analyses.collapse.study` decides which cells there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.cells import Tables
from analyses.collapse.behaviour import COUNT_QUESTIONS, PAIRS, Asked, Counted, counting, margins
from analyses.collapse.curves import Condition, curve, lengths_up_to, stream_sites
from analyses.collapse.families import Form, find_family
from analyses.collapse.features import Values, counters, feature_values, telling
from analyses.collapse.measured import Config, Settings, Weights
from analyses.collapse.paths import (
    path_sums,
    sensitivities,
    through_head,
    without_empty_start,
    without_first,
)
from analyses.collapse.precision import in_format, read_pairs
from analyses.collapse.prompts import grow
from analyses.collapse.remedies import (
    WINDOW_SINKS,
    clamped_margins,
    margins_in_format,
    plain_margins,
    strongest_separator,
    windowed_margins,
)
from analyses.collapse.theory import (
    POSITIONS,
    SyntheticLine,
    causal_uniform,
    figure_8,
    figure_9,
    figure_10,
)
from analyses.geometry_measures import geometry
from probe.attention import AS_IT_IS, Visible, attention_weights
from probe.capture import capturing
from probe.corpora import read_documents
from probe.growing import Say
from probe.language import LanguageModel
from probe.rounding import Format, rounded_model
from probe.sites import parse_site
from saes.recipe_saes import LoadedSae

FIGURE_8 = (5, 10, 50, 100, 500, 1000, 5000, 10_000)
FIGURE_9 = (500, 750, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 10_000)
FIGURE_10 = (5, 10, 100, 500, 1000, 5000)
"""Lengths of the paper's synthetic figures."""
BETAS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Divisors that path sums are taken with; 1 is Proposition B.8's."""
TEXT = "text"
"""Ordinary text, beside the prompt families."""
PHASE = 3
"""Repetitions between prompts of the same phase of a group of three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A condition of a model."""

    weights: Weights
    """Which model."""
    condition: Condition
    """What is measured."""

    @property
    def name(self) -> str:
        """In a few words."""
        said = [self.condition.family.name, self.condition.form, self.condition.visible.name]
        return ", ".join([*said, self.weights])


def synthetic(seeds: int) -> tuple[SyntheticLine, ...]:
    """The synthetic experiments: figures 8, 9 and, a line a kind of positions, 10."""
    return (
        figure_8(FIGURE_8, seeds),
        figure_9(FIGURE_9, seeds),
        *(figure_10(FIGURE_10, seeds, positions) for positions in POSITIONS),
    )


# ------------------------------------------------------------------------------------- curves


def curves_of(config: Config, settings: Settings) -> list[Curve]:
    """The curves of a study: every family, then each control on ones and on random digits."""

    def of(
        name: str, form: Form = "raw", visible: Visible = AS_IT_IS, weights: Weights = "trained"
    ) -> Curve:
        family = find_family(name)
        more = (1, PHASE) if name in ("ones", "commas") and form == "raw" else (1,)
        condition = Condition(family=family, form=form, visible=visible, more=more)
        return Curve(weights=weights, condition=condition)

    controls = [name for name in ("ones", "digits") if name in config.families]
    found = [of(name) for name in config.families]
    found += [of(name, form=form) for form in settings.forms for name in controls]
    hidden = Visible(sink="hidden")
    windows = [Visible(window=w, sink=sink) for w in settings.windows for sink in WINDOW_SINKS]
    found += [of(name, visible=seen) for seen in (hidden, *windows) for name in controls]
    twins = [*controls, *(name for name in ("commas",) if name in config.families)]
    return found + [of(name, weights="twin") for name in twins]


def curves(
    model: LanguageModel, one: Curve, config: Config, settings: Settings, say: Say
) -> Tables:
    """A condition's curves, all phrasings: table `curves`."""
    lengths = lengths_up_to(one.condition.family.longest(settings.longest))
    tables = [
        curve(model, one.condition, lengths, unit=unit, merged=config.merged, say=say).assign(
            unit=unit
        )
        for unit in range(settings.units)
    ]
    condition = one.condition
    return {
        "curves": pd.concat(tables).assign(
            family=condition.family.name, form=condition.form, attention=condition.visible.name,
            weights=one.weights,
        )
    }  # fmt: skip


def precision(
    model: LanguageModel, name: str, config: Config, settings: Settings, say: Say
) -> Tables:
    """A family in every number format: table `precision`."""
    lengths = lengths_up_to(settings.format_longest)
    condition = Condition(family=find_family(name))
    units = range(settings.format_units)
    exact, tables = {}, []
    for format in dict.fromkeys(("float64", *settings.formats)):
        rounding = rounded_model(model, format)
        for unit in units:
            last = read_pairs(
                rounding, condition, lengths, unit=unit, merged=config.merged, say=say
            )
            exact.setdefault(unit, last)
            table = in_format(model, last, exact[unit], lengths)
            tables.append(table.assign(format=format, unit=unit, family=name))
    return {"precision": pd.concat(tables)}


# -------------------------------------------------------------------------------------- paths


def path_prompts(
    model: LanguageModel, name: str, config: Config, settings: Settings
) -> Iterator[tuple[Int[Tensor, " t"], int]]:
    """Prompts of a family (or of ordinary text), each with where its sequence begins."""
    for whole, start in _whole_path_prompts(model, name, config, settings):
        tokens = without_empty_start(model, whole)
        yield tokens, start - (len(whole) - len(tokens))


def _whole_path_prompts(
    model: LanguageModel, name: str, config: Config, settings: Settings
) -> Iterator[tuple[Int[Tensor, " t"], int]]:
    for unit in range(settings.path_units):
        if name == TEXT:
            documents = read_documents("builtin")
            text = " ".join(next(documents).text for _ in range(unit + 1))
            ids = model.tokenizer(text[-8 * settings.path_length :], add_special_tokens=False)
            tokens = [model.separator_id, *ids["input_ids"][: settings.path_length]]
            yield torch.tensor(tokens), 1
        else:
            growing = grow(
                model, find_family(name), settings.path_length, phrasing=unit, seed=unit,
                merged=config.merged,
            )  # fmt: skip
            yield growing.trunk, growing.ends[0]


def paths(
    model: LanguageModel,
    name: str,
    visible: Visible,
    config: Config,
    settings: Settings,
    say: Say,
) -> Tables:
    """Path sums beside gradients.

    Tables `sensitivity` (a row a token: the input's gradients and path sums), `depths` (of the
    first prompt, every depth) and `heads` (of the first prompt: what passes each head).
    """
    tables: dict[str, list[pd.DataFrame]] = {"sensitivity": [], "depths": [], "heads": []}
    for unit, (tokens, start) in enumerate(path_prompts(model, name, config, settings)):
        by_head = attention_weights(model, tokens, visible=visible)
        gradients = [
            sensitivities(
                model, tokens, probes=settings.probes, seed=config.seed, visible=visible,
                frozen=frozen,
            )
            for frozen in (False, True)
        ]  # fmt: skip
        mean = by_head.mean(1)
        sums = {f"beta {beta:g}": path_sums(mean, beta) for beta in BETAS}
        sums["measured beta"] = path_sums(mean, norm_divisors(model, tokens))
        sums["beta 10, first token out"] = path_sums(without_first(mean), 10.0)
        sums["uniform"] = path_sums(causal_uniform(len(tokens)).expand(len(mean), -1, -1), 10.0)
        frame = {"position": np.arange(len(tokens)) - start, "unit": unit}
        tables["sensitivity"].append(
            pd.DataFrame(
                frame
                | {"gradient": gradients[0][0].numpy(), "frozen": gradients[1][0].numpy()}
                | {name: rows[0].numpy() for name, rows in sums.items()}
                | {"first token": by_head[:, :, :, 0].mean((0, 1)).numpy()}
            )
        )
        if unit == 0:
            tables["depths"] += _by_depth(gradients, sums, start)
            tables["heads"].append(_by_head(by_head, sums["beta 10"], gradients[1][0]))
        say(len(tokens))
    return {
        key: pd.concat(frames).assign(family=name, attention=visible.name)
        for key, frames in tables.items()
    }


def norm_divisors(model: LanguageModel, tokens: Int[Tensor, " t"]) -> Float[Tensor, " l"]:
    """What each layer's first norm divides by: the median over tokens of the stream's root mean
    square, the first few tokens left out."""
    sites = [parse_site(f"resid_pre.{layer}") for layer in range(model.n_layers)]
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(tokens[None])
    sizes = torch.stack([seen[site][0].double().square().mean(-1).sqrt() for site in sites])
    return sizes[:, min(8, len(tokens) - 1) :].median(-1).values.cpu()


def _by_depth(
    gradients: Sequence[Float[Tensor, "depths t"]],
    sums: Mapping[str, Float[Tensor, "depths t"]],
    start: int,
) -> Iterator[pd.DataFrame]:
    for depth in range(len(gradients[0])):
        yield pd.DataFrame(
            {
                "depth": depth, "position": np.arange(gradients[0].shape[1]) - start,
                "gradient": gradients[0][depth].numpy(), "frozen": gradients[1][depth].numpy(),
                "path": sums["beta 10"][depth].numpy(),
                "published path": sums["beta 1"][depth].numpy(),
            }
        )  # fmt: skip


def _by_head(
    by_head: Float[Tensor, "l h t t"], rows: Float[Tensor, "depths t"], frozen: Float[Tensor, " t"]
) -> pd.DataFrame:
    """Of each head: what passes it, what of that comes from the first token, and the path sums of
    that head alone, in every layer, beside the gradient."""
    passing = through_head(rows, by_head)
    layers, heads = passing.shape[:2]
    alone = [path_sums(by_head[:, head], 10.0)[0] for head in range(heads)]
    ranks = pd.DataFrame({head: row.numpy() for head, row in enumerate(alone)})
    correlation = ranks.corrwith(pd.Series(frozen.numpy()), method="spearman")
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), heads),
            "head": np.tile(np.arange(heads), layers),
            "passing": passing.sum(-1).flatten().numpy(),
            "from first": passing[..., 0].flatten().numpy(),
            "alone": np.tile(correlation.to_numpy(), layers),
        }
    )


# -------------------------------------------------------------------------------- behaviour


def asked_of(settings: Settings) -> list[Asked]:
    """The ways of asking for a copied digit."""
    ends = ("last", "first", "alternating")
    found = [Asked(end=end, hint=hint) for end in ends for hint in (False, True)]
    return found + [Asked(end=end, order="question first") for end in ends]


def copying(model: LanguageModel, pair: tuple[int, int], settings: Settings, say: Say) -> Tables:
    """Margins of one pair of digits: table `copying`."""
    found = margins(model, pair, asked_of(settings), settings.copy_lengths, say=say)
    return {"copying": found.assign(pair=f"{pair[0]}{pair[1]}")}


def counts(model: LanguageModel, what: Counted, config: Config, settings: Settings) -> Tables:
    """One sort of counting: table `counting`."""
    return {"counting": counting(model, what, settings.count_lengths, seed=config.seed)}


COUNTS: tuple[Counted, ...] = tuple(COUNT_QUESTIONS)


def pairs_of(settings: Settings) -> tuple[tuple[int, int], ...]:
    """The pairs of digits."""
    return PAIRS[: settings.pairs]


# ----------------------------------------------------------------------------------- features


def features(
    model: LanguageModel,
    name: str,
    saes: Mapping[str, LoadedSae],
    config: Config,
    settings: Settings,
    say: Say,
) -> Tables:
    """Which features of a family tell and follow n: tables `telling`, `following`, `sizes`."""
    family = find_family(name)
    lengths = lengths_up_to(family.longest(settings.longest))
    told, by_source = [], {}
    for unit in range(settings.feature_units):
        found = feature_values(
            model, Condition(family=family), lengths, saes, unit=unit, merged=config.merged, say=say
        )
        told += [telling(values, lengths).assign(unit=unit) for values in found]
        for values in found:
            by_source.setdefault((values.source, values.layer), []).append(values)
    followed = [_following(values, lengths) for values in by_source.values()]
    sizes = [
        {"source": source, "layer": layer, "features": values[0].at_n.shape[1]}
        for (source, layer), values in by_source.items()
    ]
    return {
        "sizes": pd.DataFrame(sizes).assign(family=name),
        "telling": pd.concat(told).assign(family=name),
        "following": pd.concat(followed).assign(family=name),
    }


def _following(by_unit: Sequence[Values], lengths: Sequence[int]) -> pd.DataFrame:
    rho = counters(by_unit, lengths)
    kept = np.flatnonzero(rho)
    first = by_unit[0]
    return pd.DataFrame(
        {"source": first.source, "layer": first.layer, "feature": kept, "rho": rho[kept]}
    )


# ----------------------------------------------------------------------------------- remedies


def asked_remedies(model: LanguageModel, pair: tuple[int, int], settings: Settings) -> Tables:
    """A pair's margins without a remedy, with a hint, with commas and in windows: table
    `remedies`."""
    found = [
        plain_margins(model, pair, settings.remedy_lengths),
        *windowed_margins(model, pair, settings.remedy_lengths, settings.windows),
    ]
    return {"remedies": _of_pair(found, pair)}


def format_remedies(model: LanguageModel, format: Format, settings: Settings, say: Say) -> Tables:
    """All pairs' margins in a number format: table `remedies`."""
    rounding, found = rounded_model(model, format), []
    for pair in pairs_of(settings):
        rows = margins_in_format(rounding, format, pair, settings.remedy_lengths)
        found.append(_of_pair([rows], pair))
        say(1)
    return {"remedies": pd.concat(found)}


def clamp_remedies(
    model: LanguageModel,
    pair: tuple[int, int],
    saes: Mapping[str, LoadedSae],
    config: Config,
    settings: Settings,
) -> Tables:
    """A pair's margins with a separator feature set: tables `remedies`, `separator`."""
    separator, loaded = strongest_separator(model, saes)
    found = clamped_margins(
        model, separator, loaded, pair, settings.clamp_lengths, controls=settings.controls,
        seed=config.seed,
    )  # fmt: skip
    described = pd.DataFrame(
        [
            {
                "SAE": separator.sae, "feature": separator.feature, "at commas": separator.value,
                "at digits": separator.elsewhere, "share of the stream": separator.share,
            }
        ]
    )  # fmt: skip
    return {"remedies": _of_pair(list(found), pair), "separator": described}


def _of_pair(found: Sequence[pd.DataFrame], pair: tuple[int, int]) -> pd.DataFrame:
    return pd.concat(found).assign(pair=f"{pair[0]}{pair[1]}")


# ----------------------------------------------------------------------------------- geometry


def shapes(model: LanguageModel, weights: Weights, config: Config, settings: Settings) -> Tables:
    """The shape of the cloud of a sequence's tokens at every layer: table `shapes`."""
    rows, sites = [], stream_sites(model)
    for name in ("ones", "digits", TEXT):
        tokens, start = next(path_prompts(model, name, config, settings))
        with torch.no_grad(), capturing(model, sites, early_exit=False) as seen:
            model.run(tokens[None])
        for layer, site in enumerate(sites):
            found = geometry(seen[site][0, start:].float().cpu())
            rows.append(
                {
                    "of": name, "layer": layer, "weights": weights,
                    "effective rank": found.effective_rank,
                    "participation ratio": found.participation_ratio,
                    "anisotropy": found.anisotropy, "collisions": found.collisions,
                    "nearest": found.nearest,
                }
            )  # fmt: skip
    return {"shapes": pd.DataFrame(rows)}
