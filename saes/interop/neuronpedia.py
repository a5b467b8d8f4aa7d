"""Neuronpedia's bulk-import folder, from a feature index and its SAE.

The layout and the fields are those of SAEDashboard's `neuronpedia_export.py`
(github.com/jbloomAus/SAEDashboard):

    <folder>/<model>/<layer>-<set>/
        release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl    one row each
        features/batch-<n>.jsonl.gz       a row a feature
        activations/batch-<n>.jsonl.gz    a row an example

Where they come from: `frac_nonzero` is the density, `maxActApprox` the largest activation,
`vector` the decoder row, pos_ and neg_ the direct effects on the logits, `topkCosSim*` the nearest
decoder rows, `neuron_alignment_*` the coordinates of the decoder row with the largest absolute
weights. `freq_hist_data_bar_values` are the middles of the index's bins, which grow geometrically
(SAEDashboard's are of equal width). Bins of examples are the index's exact equal-width intervals
with their exact shares; the top examples carry `binMin` = -1, as Neuronpedia marks them. An example
is a whole sequence with the feature's activation on every token.

An index knows nothing of correlated neurons, of the distribution of logit effects, of loss
contributions and of attention heads: those lists are empty. So are the correlated features, which
are Pearson correlations of activations; an index counts rows on which two features fire together,
which is another measure. Ids are made of the example's place, so the same index gives the same
file.
"""

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from probe.errors import UserError
from probe.runs import atomic_path
from probe.sites import parse_site
from saes.feature_queries import FeatureIndex
from saes.interop.names import hook_of_site
from saes.interop.tensor_files import fresh_folder
from saes.models import SparseAutoencoder
from saes.sorted_parquet import SortedParquet

FEATURES_AT_ONCE = 64
"""Features whose examples are in memory together; also the rows of one pair of files."""
ALIGNED = 3
"""Coordinates listed for a decoder row."""
DIGITS = 6
"""Significant digits of a number."""
LOST = (
    "random examples, correlations with neurons and features, the histogram of logit effects, loss "
    "contributions and head attributions are not in the import: the index has no such thing, or "
    "Neuronpedia has no place for it.",
    "the bins of the activation histogram grow geometrically, where SAEDashboard's are even.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronpediaOptions:
    """What Neuronpedia has to be told."""

    model_id: str | None = None
    """Neuronpedia's name of the model; ours where none is given."""
    source_set: str | None = None
    """Name of the set of SAEs; made of the site's kind and the SAE's width where none is given."""
    release: str = "lorgnette"
    """Name of the release."""
    release_title: str = "SAE features indexed by Lorgnette"
    """A line that describes the release."""
    creator_name: str = ""
    """Who made the SAE."""
    creator_id: str = ""
    """Neuronpedia's id of that account."""
    url: str | None = None
    """Where more is said of it."""


def write_import(
    index: FeatureIndex,
    sae: SparseAutoencoder,
    folder: Path,
    options: NeuronpediaOptions,
    *,
    metadata: Mapping[str, Any],
    progress: bool = True,
) -> tuple[Path, tuple[str, ...]]:
    """Write the import folder; gives the source's folder in it and what it does not hold.

    Args:
        index: a complete index of `sae`.
        sae: for the decoder rows.
        folder: where to; the source's folder in it must not be there yet.
        options: what Neuronpedia has to be told.
        metadata: where the SAE belongs, as its folder says.
        progress: show a bar on stderr.

    Raises `UserError` where the index is of another SAE, or the folder is there already.
    """
    if index.n_features != sae.config.d_sae:
        raise UserError(
            f"the index in {index.path} has {index.n_features} features and the SAE "
            f"{sae.config.d_sae}; give the SAE that it was made of."
        )
    place = make_place(index, sae, options, metadata)
    target = folder / place.model_id / place.source_id
    with fresh_folder(target) as partial:
        for name, row in described(place, index, options, metadata).items():
            _write_rows(partial / f"{name}.jsonl", iter([row]))
        reader = IndexReader(index, place)
        starts = range(0, index.n_features, FEATURES_AT_ONCE)
        for number, start in enumerate(tqdm(starts, desc="export", disable=not progress)):
            features = range(start, min(start + FEATURES_AT_ONCE, index.n_features))
            rows, examples = reader.rows(features, sae)
            name = f"batch-{number}.jsonl.gz"
            _write_rows(partial / "features" / name, iter(rows))
            _write_rows(partial / "activations" / name, examples)
    return target, LOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The words that every row carries."""

    model_id: str
    """Neuronpedia's name of the model."""
    source_id: str
    """Layer and set: which SAE."""
    source_set: str
    """Name of the set."""
    hook_name: str
    """TransformerLens's name of the site."""
    creator_id: str
    """Whose it is."""
    dataset: str
    """The text behind the examples."""
    created: str
    """When the index was finished: every row carries it, so that an export can be repeated."""


def make_place(
    index: FeatureIndex,
    sae: SparseAutoencoder,
    options: NeuronpediaOptions,
    metadata: Mapping[str, Any],
) -> Place:
    """The words for an index's rows."""
    site = str(index.run.config["site"])
    known = parse_site(site)
    kind = known.kind.replace("_", "-")
    layer = 0 if known.layer is None else known.layer
    source_set = options.source_set or f"{kind}-{sae.config.d_sae}"
    return Place(
        model_id=file_name(options.model_id or str(metadata.get("model_name") or "unknown")),
        source_id=file_name(f"{layer}-{source_set}"),
        source_set=source_set,
        hook_name=hook_of_site(site),
        creator_id=options.creator_id,
        dataset=str(metadata.get("dataset_path") or ""),
        created=str(index.run.manifest["created"]),
    )


def described(
    place: Place,
    index: FeatureIndex,
    options: NeuronpediaOptions,
    metadata: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The one row of each of release, model, sourceset and source."""
    created = {"creatorId": place.creator_id, "createdAt": place.created}
    shown = {"visibility": "PUBLIC"}
    release = {
        "name": options.release,
        "description": options.release_title,
        "descriptionShort": options.release_title,
        "urls": [options.url] if options.url else [],
        "creatorName": options.creator_name,
        "creatorNameShort": options.creator_name,
        "isNewUi": False,
        "featured": False,
        "defaultUmapSourceIds": [],
    }
    model = {
        "id": place.model_id,
        "instruct": place.model_id.lower().endswith(("-it", "-instruct")),
        "displayNameShort": place.model_id,
        "displayName": place.model_id,
        "inferenceEnabled": False,
        "layers": 0,
        "neuronsPerLayer": 0,
        "owner": "",
        "updatedAt": place.created,
    }
    source_set = {
        "modelId": place.model_id,
        "name": place.source_set,
        "description": options.release_title,
        "type": "",
        "creatorName": options.creator_name,
        "releaseName": options.release,
        "urls": [],
        "hasDashboards": True,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }
    source = {
        "id": place.source_id,
        "modelId": place.model_id,
        "setName": place.source_set,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "dataset": place.dataset,
        "num_prompts": index.summary["n_sequences"],
        "num_tokens_in_prompt": metadata.get("context_size"),
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "notes": None,
    }
    rows = {"release": release, "model": model, "sourceset": source_set, "source": source}
    return {name: row | created | shown for name, row in rows.items()}


class IndexReader:
    """Rows for Neuronpedia from an index's files, some features at a time."""

    def __init__(self, index: FeatureIndex, place: Place) -> None:
        self.index = index
        self.place = place
        names = ("features", "examples", "neighbours")
        self._tables = {n: SortedParquet(index.path / f"{n}.parquet", "feature") for n in names}
        self._edges = index.histogram_edges

    def rows(
        self, features: range, sae: SparseAutoencoder
    ) -> tuple[list[dict[str, Any]], Iterator[dict[str, Any]]]:
        """The rows of some features, and those of their examples."""
        tables = {
            name: table.read(list(features)).to_pylist() for name, table in self._tables.items()
        }
        near: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(tables["neighbours"], key=lambda row: row["rank"]):
            near.setdefault(row["feature"], []).append(row)
        vectors = sae.W_dec.detach()[features.start : features.stop].cpu().numpy()
        rows = [
            self._feature(
                row, vectors[row["feature"] - features.start], near.get(row["feature"], [])
            )
            for row in tables["features"]
        ]
        maxima = {row["feature"]: row["max"] for row in tables["features"]}
        return rows, self._examples(tables["examples"], maxima)

    def _feature(
        self, row: dict[str, Any], vector: np.ndarray, near: list[dict[str, Any]]
    ) -> dict[str, Any]:
        largest = short(row["max"] or 0.0)
        middles = [
            (low + high) / 2 for low, high in zip(self._edges, self._edges[1:], strict=False)
        ]
        bars = [(m, n) for m, n in zip(middles, row["histogram"], strict=True) if n]
        strongest = np.argsort(-np.abs(vector), kind="stable")[:ALIGNED]
        total = float(np.abs(vector).sum()) or 1.0
        empty = (
            "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
            "correlated_features_indices", "correlated_features_pearson",
            "correlated_features_l1", "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values", "decoder_weights_dist",
        )  # fmt: skip
        return {
            **self._words(row["feature"]),
            "sourceSetName": self.place.source_set,
            "maxActApprox": largest,
            "hasVector": True,
            "vector": shorts(vector),
            "vectorLabel": None,
            "vectorDefaultSteerStrength": largest,
            "hookName": self.place.hook_name,
            "topkCosSimIndices": [n["neighbour"] for n in near],
            "topkCosSimValues": shorts([n["cosine"] for n in near]),
            "neuron_alignment_indices": strongest.tolist(),
            "neuron_alignment_values": shorts(vector[strongest]),
            "neuron_alignment_l1": shorts(np.abs(vector[strongest]) / total),
            "neg_str": row["negative_tokens"] or [],
            "neg_values": shorts(row["negative_logits"] or []),
            "pos_str": row["positive_tokens"] or [],
            "pos_values": shorts(row["positive_logits"] or []),
            "frac_nonzero": short(row["density"]),
            "freq_hist_data_bar_heights": [n for _, n in bars],
            "freq_hist_data_bar_values": shorts([m for m, _ in bars]),
            **{name: [] for name in empty},
        }

    def _examples(
        self, examples: list[dict[str, Any]], maxima: Mapping[int, float]
    ) -> Iterator[dict[str, Any]]:
        shown = [row for row in examples if row["kind"] in ("top", "interval")]
        tokens = self.index.sequences([row["sequence"] for row in shown])
        for row in shown:
            yield self._example(row, tokens[row["sequence"]], maxima[row["feature"]])

    def _example(self, row: dict[str, Any], tokens: list[int], largest: float) -> dict[str, Any]:
        values = [0.0] * len(tokens)
        for position, value in zip(row["positions"], row["activations"], strict=True):
            values[position] = short(value)
        top = row["kind"] == "top"
        place = (row["feature"], row["kind"], row["interval"], row["rank"], self.place.source_id)
        return {
            "id": "c" + hashlib.sha256(repr(place).encode()).hexdigest()[:24],
            **self._words(row["feature"]),
            "tokens": self.index.texts(tokens),
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": -1 if top else short(row["interval_low"]),
            "binMax": short(largest if top else row["interval_high"]),
            "binContains": -1 if top else short(row["interval_share"]),
            "qualifyingTokenIndex": row["position"],
            "dataIndex": str(row["doc"]),
            "dataSource": self.place.dataset,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            "zIndices": None,
            "zValues": None,
        }

    def _words(self, feature: int) -> dict[str, Any]:
        return {
            "modelId": self.place.model_id,
            "layer": self.place.source_id,
            "index": str(feature),
            "creatorId": self.place.creator_id,
            "createdAt": self.place.created,
        }


def file_name(text: str) -> str:
    """A name that is also a folder's: of a path its last part, other characters as `_`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text.rstrip("/").rpartition("/")[2]).strip(".") or "_"


def short(value: float) -> float:
    """A number of six significant digits: what a file of text should hold of a float32."""
    return float(f"{value:.{DIGITS}g}")


def shorts(values: Any) -> list[float]:
    """`short`, one by one."""
    return [short(float(value)) for value in values]


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as lines of JSON, compressed where the name says so; the same bytes each time."""
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        if path.suffix == ".gz":
            with (
                gzip.GzipFile("", "wb", 5, raw, mtime=0) as packed,
                io.TextIOWrapper(packed, encoding="utf-8") as file,
            ):
                _write_lines(file, rows)
        else:
            with io.TextIOWrapper(raw, encoding="utf-8") as file:
                _write_lines(file, rows)


def _write_lines(file: io.TextIOWrapper, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
