"""Transport between two prompts in memory: scores, and recipes; models are those of `app.live`."""

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
import torch
from jaxtyping import Float
from torch import Tensor

from app.data import SaeRecord, stamp
from app.live import load_images, shared_sae
from app.live_images import site_of
from app.mask_canvas import Rows
from app.pair_input import Aggregate, AskedPair
from probe.capture import site_widths
from probe.diffusion import DiffusionModel, DrawConfig
from probe.sites import parse_site
from saes.folder import WEIGHTS
from saes.recipe_saes import LoadedSae, common_dtype
from saes.recipes import to_json
from saes.transport import (
    Chosen,
    Pair,
    feature_scores,
    neuron_recipe,
    neuron_sites,
    recipe_of_features,
    steering_recipe,
)

Records = tuple[SaeRecord, ...]


def scores(records: Records, asked: AskedPair, aggregate: Aggregate) -> pd.DataFrame:
    """Every feature with its score, as `saes.transport.feature_scores`; shared, not to be changed.

    Raises as that does.
    """
    paths = tuple(record.run.path for record in records)
    return _scores(records, paths, tuple(map(_changed, records)), asked, aggregate)


@st.cache_resource(show_spinner=False, max_entries=16)
def _scores(
    _records: Records,
    paths: tuple[Path, ...],
    changed: tuple[float, ...],
    asked: AskedPair,
    aggregate: Aggregate,
) -> pd.DataFrame:
    model, lock, saes = _held(_records)
    with lock:
        return feature_scores(model, saes, pair_of(asked), aggregate=aggregate)


def features(
    records: Records, asked: AskedPair, added: pd.DataFrame, removed: pd.DataFrame, *, m: float
) -> dict[str, Any]:
    """The recipe that transports chosen rows of `scores`. Raises as `recipe_of_features` does."""
    model, _, saes = _held(records)
    chosen = Chosen(added=_by_site(added), removed=_by_site(removed))
    what = f"features, {len(added)} added, {len(removed)} removed, m {m:g}"
    return to_json(recipe_of_features(model, saes, pair_of(asked), chosen, m=m, what=what))


def updates(records: Records, asked: AskedPair, *, m: float, only_add: bool) -> dict[str, Any]:
    """The recipe of activation steering at the same blocks. Raises as `steering_recipe` does."""
    model, _, _ = _held(records)
    sites = [site_of(record) for record in records]
    return to_json(steering_recipe(model, sites, pair_of(asked), m=m, only_add=only_add))


def neurons(
    records: Records, asked: AskedPair, *, k: int, m: float, aggregate: Aggregate, only_add: bool
) -> dict[str, Any]:
    """The recipe of neuron transport inside the same blocks. Raises as `neuron_recipe` does."""
    model, lock, _ = _held(records)
    sites = [site_of(record) for record in records]
    with lock:
        recipe = neuron_recipe(
            model, sites, pair_of(asked), k=k, m=m, aggregate=aggregate, only_add=only_add
        )
    return to_json(recipe)


def n_neurons(records: Records) -> int:
    """How many neurons the blocks have."""
    return _n_neurons(records, tuple(record.run.path for record in records))


@st.cache_resource(show_spinner=False, max_entries=16)
def _n_neurons(_records: Records, paths: tuple[Path, ...]) -> int:
    model, lock, _ = _held(_records)
    sites = [site for record in _records for site in neuron_sites(model, site_of(record))]
    with lock:
        return sum(site_widths(model, sites).values())


def pair_of(asked: AskedPair) -> Pair:
    """The pair as `saes.transport` takes it."""
    return Pair(
        source=asked.source,
        target=asked.target.prompt,
        seed=asked.target.seed,
        draw=DrawConfig(**asked.target.draw),
        source_mask=_tensor(asked.source_mask),
        target_mask=_tensor(asked.target_mask),
    )


def _tensor(mask: Rows | None) -> Float[Tensor, "h w"] | None:
    return None if mask is None else torch.tensor(mask)


def _by_site(rows: pd.DataFrame) -> dict:
    return {
        parse_site(str(site)): tuple(some["feature"].tolist())
        for site, some in rows.groupby("site", sort=False)
    }


def _changed(record: SaeRecord) -> float:
    return stamp(record.run.path / WEIGHTS)


def _held(records: Records) -> tuple[DiffusionModel, threading.Lock, dict[str, LoadedSae]]:
    """The model, its lock, and the SAEs by their names."""
    saes = {
        record.name: LoadedSae(
            run=record.run,
            sae=shared_sae(record.run.path, _changed(record)),
            site=record.run.config["site"],
        )
        for record in records
    }
    described = records[0].run.config["model"]
    model, lock = load_images(
        described["spec"], described.get("random_weights"), common_dtype(saes)
    )
    return model, lock, saes
