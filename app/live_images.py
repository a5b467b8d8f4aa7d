"""Images drawn for a page and what SAEs say of them; models and SAEs are those of `app.live`.

Imports the model libraries, as `app.live` does. One drawing reads every block that has an SAE, so
that changing the SAE costs no second one. What is kept is shared by all sessions.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import streamlit as st
from jaxtyping import Float, UInt8
from torch import Tensor

from app import data
from app.data import SaeRecord, stamp
from app.image_input import Asked
from app.live import load_images, shared_sae
from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import UserError
from probe.models import Dtype
from probe.passes import read_passes
from probe.sites import Site, parse_site
from saes.folder import WEIGHTS
from saes.models import SparseAutoencoder
from saes.place_codes import PlaceCodes, place_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An image, and what passed by at some sites while it was drawn."""

    image: UInt8[Tensor, "h w 3"]
    """The image."""
    values: Mapping[Site, Float[Tensor, "s _t _d"]]
    """Each site's activations of the row that reads the prompt, on the CPU."""
    grids: Mapping[Site, tuple[int, int]]
    """Height and width of each site's feature map."""
    truncated: bool
    """Whether the prompt is longer than the model reads."""


def codes(record: SaeRecord, asked: Asked) -> PlaceCodes:
    """What an SAE says of an image, at every step and place.

    Raises `UserError` where the model is not there, has no such block or draws in fewer steps, or
    the SAE has another width.
    """
    return _codes(record, record.run.path, stamp(record.run.path / WEIGHTS), asked)


@st.cache_resource(show_spinner=False, max_entries=64)
def _codes(_record: SaeRecord, path: Path, changed: float, asked: Asked) -> PlaceCodes:
    site, found = site_of(_record), seen(_record, asked)
    if site not in found.values:
        model, _ = _model_of(_record)
        model.block(site)  # says that there is none
    sae, x = shared_sae(path, changed), found.values[site]
    if x.shape[-1] != sae.config.d_in:
        raise UserError(
            f"{_record.name} reads activations of width {sae.config.d_in} and {site} of "
            f"{_record.run.config['model']['spec']} gives {x.shape[-1]}; choose an SAE of that "
            "model."
        )
    return place_codes(sae, x, found.grids[site], found.image)


def sae_of(record: SaeRecord) -> SparseAutoencoder:
    """An SAE, shared by all sessions."""
    return shared_sae(record.run.path, stamp(record.run.path / WEIGHTS))


def site_of(record: SaeRecord) -> Site:
    """Where an SAE reads."""
    return parse_site(record.run.config["site"])


def seen(record: SaeRecord, asked: Asked) -> Seen:
    """The image, drawn once for all SAEs of the model. Raises as `codes` does."""
    described = record.run.config["model"]
    seed, dtype = described.get("random_weights"), described.get("dtype", "auto")
    return _seen(described["spec"], seed, dtype, _sites(record), asked)


def _model_of(record: SaeRecord) -> tuple[DiffusionModel, threading.Lock]:
    described = record.run.config["model"]
    seed, dtype = described.get("random_weights"), described.get("dtype", "auto")
    return load_images(described["spec"], seed, dtype)


def _sites(record: SaeRecord) -> tuple[str, ...]:
    """The sites that are read together: this SAE's, and the blocks that have others."""
    same = [one.run.config["site"] for one in data.saes_of_model(record)]
    blocks = {site for site in same if parse_site(site).kind == "block"}
    # In one order for the SAEs of all blocks: it is part of what the drawing is known by.
    return tuple(sorted(blocks | {record.run.config["site"]}))


@st.cache_resource(show_spinner=False, max_entries=4)
def _seen(
    spec: str, random_weights: int | None, dtype: Dtype, sites: tuple[str, ...], asked: Asked
) -> Seen:
    model, lock = load_images(spec, random_weights, dtype)
    config = DrawConfig(**asked.draw)
    blocks = set(model.sites())
    # A block that the model has not is for whoever asks for it: others go on.
    read = [one for one in map(parse_site, sites) if one.kind != "block" or _update(one) in blocks]
    with lock:
        grids = {site: model.grid(site, config) for site in read}
        passes = read_passes(model, [asked.prompt], [asked.seed], config, read, draw=True)
        truncated = bool(model.truncated([asked.prompt])[0])
    assert passes.drawn is not None, "it was asked for"
    return Seen(
        image=passes.drawn.images[0],
        values={site: x[:, 0].cpu() for site, x in passes.values.items()},
        grids=grids,
        truncated=truncated,
    )


def _update(site: Site) -> Site:
    """The block's update, which `sites` of a model lists."""
    return replace(site, tensor="update")
