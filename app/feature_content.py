"""All that there is to say about one feature, gathered: what its page shows and its files hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int

from app.headlines import Headline
from app.strips import ExampleGroup, Strip
from app.tiles import Tile
from app.wording import Unit
from saes.notes import Note


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WhereAndWhen:
    """Where in images a feature fires, and at which steps."""

    mean: Float[np.ndarray, "h w"]
    """Mean activation at each place over all images and steps."""
    firings: Int[np.ndarray, "h w"]
    """How often it fires there."""
    steps: pd.DataFrame
    """Its firings by step and row of guidance."""

    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "mean_map": self.mean.tolist(),
            "firings_map": self.firings.tolist(),
            "steps": _plain(self.steps),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureContent:
    """One feature of one SAE."""

    sae: str
    """Name of the SAE's folder."""
    feature: int
    """Its number."""
    row: Mapping[str, Any]
    """Its row of the index."""
    edges: tuple[float, ...]
    """Bounds of the bins of its histogram."""
    headlines: tuple[Headline, ...]
    """Its numbers beside the twin's."""
    groups: tuple[ExampleGroup, ...]
    """Its examples."""
    tokens: pd.DataFrame
    """The tokens, or places, it fires on most."""
    in_images: WhereAndWhen | None = None
    """Where in images it fires; None of text."""
    neighbours: pd.DataFrame
    """Features with the nearest decoder directions."""
    coactive: pd.DataFrame
    """Features that fire on the same tokens; empty where the index does not say."""
    note: Note
    """What a person wrote."""
    lists: tuple[str, ...]
    """The lists it is in."""
    automatic: Mapping[str, Any] | None
    """Its automatic label with score and control; None where it has none."""
    provenance: Mapping[str, Any]
    """Where the SAE comes from and how good it is."""

    @property
    def unit(self) -> Unit:
        """What it fires on."""
        return "tokens" if self.in_images is None else "places"

    @property
    def title(self) -> str:
        """What to call it: its number, and the label where it has one."""
        label = self.note.label or (self.automatic or {}).get("label") or ""
        return f"Feature {self.feature}" + (f": {label}" if label else "")

    def document(self) -> dict[str, Any]:
        """The feature as one JSON object."""
        return {
            "sae": self.sae,
            "feature": self.feature,
            "provenance": self.provenance,
            "label": asdict(self.note),
            "lists": list(self.lists),
            "automatic_label": self.automatic,
            "statistics": self.row,
            "beside_the_twin": [asdict(headline) for headline in self.headlines],
            "histogram_edges": list(self.edges),
            self.unit: _plain(self.tokens),
            **({} if self.in_images is None else {"in_images": self.in_images.document()}),
            "neighbours": _plain(self.neighbours),
            "coactive": _plain(self.coactive),
            "examples": [_group(group) for group in self.groups],
        }


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return pa.Table.from_pandas(frame, preserve_index=False).to_pylist()


def _group(group: ExampleGroup) -> dict[str, Any]:
    interval = group.kind == "interval"
    return {
        "kind": group.kind,
        "interval": [group.low, group.high] if interval else None,
        "share": group.share if interval else None,
        "sequences": [_example(example) for example in group.examples],
    }


def _example(example: Strip | Tile) -> dict[str, Any]:
    if isinstance(example, Strip):
        return {
            "tokens": example.tokens,
            "activations": example.activations,
            "position": example.focus,
            "document": example.document,
        }
    known = {} if example.known.all() else {"known": example.known.tolist()}
    return known | {
        "image": example.image,
        "prompt": example.prompt,
        "seed": example.seed,
        "step": example.step,
        "conditional": example.conditional,
        "activations": example.heat.tolist(),
        "position": list(example.focus),
    }
