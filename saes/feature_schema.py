"""The feature index on disk: what is asked (`IndexConfig`) and the Parquet files that answer.

    features.parquet     a row a feature, sorted by feature
    examples.parquet     sorted by feature, kind, interval, rank
    sequences.parquet    every sequence of the store that was used, sorted
    vocabulary.parquet   a row a token: the piece as shown
    tokens.parquet       token <-> feature, sorted by token; the strongest pairs only
    neighbours.parquet   a row a pair of features with near decoder directions, sorted by feature
    coactivations.parquet  a row a pair of features that fire together, sorted by feature
    documents.parquet    document number -> id

Of a store of images a token is a place of the feature map, called `y,x`, and a sequence is one pass
of the U-Net over one image; an example is then a whole map. Four files more say what a picture
takes, so that nothing else is needed to show one:

    passes.parquet       sequence -> image, step, row of guidance, sorted by sequence
    images.parquet       the images that some example is of, with their pixels, sorted by image
    places.parquet       a row a living feature: where in the images it fires
    steps.parquet        a row a living feature, step and row of guidance

Definitions, over all rows (kept tokens) that were used; a feature *fires* on a row where its code
is greater than zero:

- `n_active` rows it fires on; `density` = n_active / rows; `mean`, `sd` (population) and `max` are
  over the rows it fires on and null for a dead feature.
- `histogram[i]` counts firings in `(edge[i], edge[i + 1]]`, the edges being log-spaced, the same
  for all features and recorded in the manifest as `histogram_edges`. The last edge is the largest
  code there is, the first one the smallest, but at least one decade below the largest and at most
  `HISTOGRAM_DECADES`; bin 0 also counts the codes at or below its lower edge.
- `top_tokens`: the tokens with most summed activation; `top_token_shares`: their share of the
  feature's summed activation.
- `positive_*`, `negative_*`: the direct effect of one unit of the code on the logits
  (`saes.feature_weights.logit_effects`); null where the site has no such reading.
- Intervals are `intervals` equal-width bins `(0, max]` of each feature, closed above;
  `interval_share` is the exact share of all its firings. An interval that never fires has no rows.
- Examples show a sequence at most once within `top`, within `random` and within one interval: `top`
  and `random` at the sequence's peak, an interval at the sequence's strongest firing inside it,
  sequences that peak there being taken first. Equal activations: the earlier sequence and position.
  `positions` and `activations` hold all of the feature's firings in the sequence.
- `random` and interval examples are the first in the order of a seeded hash of (feature, sequence):
  the same index each time, whatever the number of threads or partitions.
- In `tokens.parquet` a pair is kept where one of its ranks (from 0, by summed activation) is below
  `TOKEN_RANKS`; `rank_for_token` and `rank_for_feature` are null from there on. `share` is the
  share of the token's occurrences on which the feature fires.
- In `coactivations.parquet`, `n_both` counts the rows on which both features fire; `jaccard` =
  n_both / (n_a + n_b - n_both), the share of the rows of either; `pmi`, in bits, is
  log2(p(a, b) / (p(a) p(b))), p being shares of rows. A living feature has those of largest
  `jaccard`, of equals the lower number, among pairs that share at least `LEAST_TOGETHER` rows and
  more than by chance (pmi > 0).
  All rows count, unless there are too many pairs (`coactive_pairs`): then those of sequences drawn
  by the seed, `n_coactive_rows` of the manifest's summary.
- In `passes.parquet`, `kept` are the places of the pass that the store has rows of, null where it
  has all. In `images.parquet`, `format` and `data` are null where the store kept no picture; prompt
  and seed draw it again.
- In `places.parquet`, `places` are those on which the feature fires at all; `n` counts its firings
  on each, `mean` is the mean of its code over all rows of that place, silent ones as 0.
- In `steps.parquet`, `share` is the step's share of the feature's firings, `density` the share of
  the step's rows on which it fires, `mean` over those on which it does. Steps without are left out.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from probe.errors import UserError

SCHEMA = 2
"""Version of the tables; one that is not this is refused."""
HISTOGRAM_DECADES = 4
"""Orders of magnitude that the activation histogram spans at most."""
TOP_TOKENS = 5
"""Tokens named in a row of features.parquet."""
TOKEN_RANKS = 32
"""Pairs kept in tokens.parquet for each token and for each feature."""
LEAST_TOGETHER = 5
"""Rows that two features must share to be listed as firing together."""

FEATURE_ROW_GROUP = 1024
"""Rows of features.parquet that are read together."""
EXAMPLE_ROW_GROUP = 4096
"""Rows of examples.parquet that are read together: about fifty features."""
ROW_GROUP = 16384
"""Rows of the other tables that are read together."""
SEQUENCE_TOKENS_IN_ROW_GROUP = 8192
"""Tokens of sequences.parquet that are read together: a lookup is of single sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """What a feature index holds. Everything here is part of the name of its folder."""

    top: int = 20
    """Strongest examples of each feature, in sequences."""
    intervals: int = 10
    """Equal-width intervals between zero and a feature's largest activation."""
    per_interval: int = 5
    """Examples from each interval, in sequences."""
    random: int = 10
    """Random examples of each feature, in sequences on which it fires."""
    neighbours: int = 10
    """Features with the nearest decoder directions that are listed for each feature."""
    coactive: int = 10
    """Features that fire together with each feature most that are listed for it."""
    coactive_pairs: int = 100_000_000_000
    """Pairs of firings counted for it (rows times L0 squared), about a nanosecond each on a thread;
    where there are more, sequences are drawn and the manifest says how many rows were counted."""
    logits: int = 10
    """Tokens listed for each feature at each end of its effect on the logits."""
    histogram_bins: int = 50
    """Bins of the activation histogram, log-spaced."""
    max_rows: int | None = None
    """Rows of the store to use, rounded up to a whole sequence; None for all."""
    batch_rows: int = 2048
    """Rows encoded at a time."""
    seed: int = 0
    """Seed of the choice of random and interval examples."""

    def run_config(self, *, sae: str, store: str, site: str) -> dict[str, Any]:
        """The `config.json` of the index of an SAE (its weights' hash) on a store's site."""
        asked = {"kind": "index", "schema": SCHEMA, "sae": sae, "store": store, "site": site}
        return asked | asdict(self)

    def __post_init__(self) -> None:
        positive = (
            "top",
            "intervals",
            "histogram_bins",
            "batch_rows",
            "max_rows",
            "coactive_pairs",
        )
        for field in fields(self):
            value, low = getattr(self, field.name), int(field.name in positive)
            if value is not None and value < low:
                raise UserError(f"{field.name} of an index must be {low} or more; got {value}.")


def literal_path(path: Path) -> str:
    """A path as DuckDB takes it literally, though it hold wildcards."""
    return re.sub(r"([\[*?])", r"[\1]", str(path))


def _schema(columns: dict[str, Any]) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


FEATURES = _schema(
    {
        "feature": pa.int32(),
        "alive": pa.bool_(),
        "n_active": pa.int64(),
        "density": pa.float64(),
        "mean": pa.float32(),
        "sd": pa.float32(),
        "max": pa.float32(),
        "histogram": pa.list_(pa.int64()),
        "top_tokens": pa.list_(pa.string()),
        "top_token_shares": pa.list_(pa.float32()),
        "positive_tokens": pa.list_(pa.string()),
        "positive_logits": pa.list_(pa.float32()),
        "negative_tokens": pa.list_(pa.string()),
        "negative_logits": pa.list_(pa.float32()),
        "decoder_norm": pa.float32(),
        "encoder_decoder_cosine": pa.float32(),
        "nearest_cosine": pa.float32(),
    }
)

EXAMPLES = _schema(
    {
        "feature": pa.int32(),
        "kind": pa.string(),
        "interval": pa.int16(),
        "interval_low": pa.float32(),
        "interval_high": pa.float32(),
        "interval_share": pa.float64(),
        "rank": pa.int16(),
        "activation": pa.float32(),
        "sequence": pa.int32(),
        "position": pa.int16(),
        "doc": pa.int32(),
        "token": pa.int32(),
        "positions": pa.list_(pa.int16()),
        "activations": pa.list_(pa.float32()),
    }
)

SEQUENCES = _schema(
    {"sequence": pa.int32(), "tokens": pa.list_(pa.int32()), "docs": pa.list_(pa.int32())}
)

VOCABULARY = _schema({"token": pa.int32(), "text": pa.string(), "special": pa.bool_()})

TOKENS = _schema(
    {
        "token": pa.int32(),
        "feature": pa.int32(),
        "n": pa.int64(),
        "mean": pa.float32(),
        "max": pa.float32(),
        "share": pa.float64(),
        "rank_for_token": pa.int32(),
        "rank_for_feature": pa.int32(),
    }
)

NEIGHBOURS = _schema(
    {
        "feature": pa.int32(),
        "rank": pa.int16(),
        "neighbour": pa.int32(),
        "cosine": pa.float32(),
    }
)

COACTIVATIONS = _schema(
    {
        "feature": pa.int32(),
        "rank": pa.int16(),
        "other": pa.int32(),
        "n_both": pa.int64(),
        "jaccard": pa.float64(),
        "pmi": pa.float64(),
    }
)

DOCUMENTS = _schema({"doc": pa.int32(), "id": pa.string()})

CODES = _schema(
    {
        "feature": pa.int32(),
        "sequence": pa.int32(),
        "position": pa.int16(),
        "doc": pa.int32(),
        "token": pa.int32(),
        "value": pa.float32(),
    }
)
"""Not part of the index: one firing, on its way from the encoder to the statistics."""

PASSES = _schema(
    {
        "sequence": pa.int32(),
        "image": pa.int32(),
        "step": pa.int16(),
        "conditional": pa.bool_(),
        "kept": pa.list_(pa.int16()),
    }
)

IMAGES = _schema(
    {
        "image": pa.int32(),
        "doc": pa.int32(),
        "seed": pa.int64(),
        "prompt": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "format": pa.string(),
        "data": pa.binary(),
    }
)

PLACES = _schema(
    {
        "feature": pa.int32(),
        "places": pa.list_(pa.int16()),
        "n": pa.list_(pa.int64()),
        "mean": pa.list_(pa.float32()),
    }
)

STEPS = _schema(
    {
        "feature": pa.int32(),
        "step": pa.int16(),
        "conditional": pa.bool_(),
        "n": pa.int64(),
        "share": pa.float64(),
        "density": pa.float64(),
        "mean": pa.float32(),
    }
)

TABLES = {
    "features": FEATURES,
    "examples": EXAMPLES,
    "sequences": SEQUENCES,
    "vocabulary": VOCABULARY,
    "tokens": TOKENS,
    "neighbours": NEIGHBOURS,
    "coactivations": COACTIVATIONS,
    "documents": DOCUMENTS,
}
"""Every file of an index, by name without its ending."""

IMAGE_TABLES = {"passes": PASSES, "images": IMAGES, "places": PLACES, "steps": STEPS}
"""The further files of an index of images."""
