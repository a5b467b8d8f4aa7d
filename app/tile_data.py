"""Examples of image features as the pages show them, read from the index alone.

What `app.data` is for text: cached by path and time of change, shared, not to be written to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import streamlit as st

from app.tiles import Tile, picture_url
from saes.feature_places import IndexedImage, Pass
from saes.feature_queries import FeatureIndex

NAMED = 8
"""Strongest images of a feature whose prompts name it and are searched."""


def tiles(index: FeatureIndex, rows: pd.DataFrame) -> list[Tile]:
    """Examples as images with maps.

    Args:
        index: of images.
        rows: of `FeatureIndex.examples`.
    """
    tables = index.images
    passes = tables.passes(rows["sequence"].tolist())
    images = tables.images(sorted({one.image for one in passes.values()}))
    return [
        _tile(index, row, passes[row["sequence"]], images[passes[row["sequence"]].image])
        for row in rows.to_dict("records")
    ]


def _tile(index: FeatureIndex, row: Mapping[Any, Any], one: Pass, image: IndexedImage) -> Tile:
    tables = index.images
    y, x = divmod(int(row["position"]), tables.grid[1])
    return Tile(
        picture=_picture(index.path, image.image, image.data, image.format),
        size=(image.height, image.width),
        heat=tables.map_of(row["positions"], row["activations"]),
        known=tables.known(one),
        focus=(y, x),
        image=image.image,
        prompt=image.prompt,
        seed=image.seed,
        step=one.step,
        conditional=one.conditional,
        draw=draw_address(index),
    )


@st.cache_data(show_spinner=False, max_entries=4096)
def _picture(path: Path, image: int, _data: bytes | None, _kind: str | None) -> str:
    """An image as the pages show it, shrunk once; an index's images never change."""
    return "" if _data is None or _kind is None else picture_url(_data, _kind)


def draw_address(index: FeatureIndex) -> dict[str, str]:
    """How the images were drawn, as an address of the page Explore says it."""
    steps, guidance = index.images.n_steps, index.images.guidance
    found = {"steps": str(steps)} if steps != 1 else {}
    return found | ({"guidance": f"{guidance:g}"} if guidance else {})


def strongest(index: FeatureIndex, features: Sequence[int]) -> dict[int, Tile]:
    """The image on which each feature fires most; dead ones have none."""
    return _strongest(index, index.path, tuple(features))


@st.cache_resource(show_spinner=False, max_entries=64)
def _strongest(_index: FeatureIndex, path: Path, features: tuple[int, ...]) -> dict[int, Tile]:
    rows = _index.strongest_examples(features)
    found = zip(rows["feature"].tolist(), tiles(_index, rows), strict=True)
    return dict(found)


# ------------------------------------------------------------------------------------- prompts


def prompts(index: FeatureIndex) -> pd.DataFrame:
    """The prompts of every feature's strongest images: feature, rank, prompt; a row an image."""
    return _prompts(index, index.path)


@st.cache_resource(show_spinner=False, max_entries=4)
def _prompts(_index: FeatureIndex, path: Path) -> pd.DataFrame:
    columns = ["feature", "kind", "rank", "sequence"]
    examples = pq.read_table(path / "examples.parquet", columns=columns).to_pandas()
    top = examples[(examples["kind"] == "top") & (examples["rank"] < NAMED)]
    passes = pq.read_table(path / "passes.parquet", columns=["sequence", "image"]).to_pandas()
    images = pq.read_table(path / "images.parquet", columns=["image", "prompt"]).to_pandas()
    found = top.merge(passes, on="sequence").merge(images, on="image")
    shown = found.sort_values(["feature", "rank"], kind="stable")
    return shown[["feature", "rank", "prompt"]].reset_index(drop=True)


def features_of_prompts(index: FeatureIndex, text: str) -> dict[int, float]:
    """Share of each feature's strongest images whose prompt holds a text, in any case; not 0."""
    rows = prompts(index)
    held = rows["prompt"].str.lower().str.contains(text.lower(), regex=False).to_numpy(dtype=bool)
    features = rows["feature"].to_numpy()
    hits = np.bincount(features[held], minlength=index.n_features)
    shares = hits / np.bincount(features, minlength=index.n_features).clip(1)
    return {int(feature): float(shares[feature]) for feature in np.flatnonzero(hits)}
