"""Labels on disk: what was asked (`LabelConfig`), labels.parquet, and reading them back.

labels-<hash8>/
    config.json       the index, the method, where labels come from
    labels.parquet    a row a labelled feature: `LABELS`
    answers.jsonl     what an endpoint said, as it said it (only where one was asked)
    manifest.json
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probe.errors import Failure, UserError
from probe.runs import Run, atomic_path

SCHEMA = 1
KIND = "labels"
TABLE = "labels.parquet"
Method = Literal["offline", "file", "endpoint"]
LABELS = pa.schema(
    [
        pa.field("feature", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("rule", pa.string()),
        pa.field("method", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("score_low", pa.float64()),
        pa.field("score_high", pa.float64()),
        pa.field("n_positive", pa.int32()),
        pa.field("n_negative", pa.int32()),
        pa.field("control", pa.float64()),
        pa.field("sensitivity", pa.float64()),
        pa.field("specificity", pa.float64()),
        pa.field("n_hard", pa.int32()),
        pa.field("width", pa.int16()),
        pa.field("making", pa.float64()),
    ]
)
"""Columns of labels.parquet, a row a labelled feature, by feature. `rule` is null for labels that
have none; `score` ... `control` are null where a label cannot be scored; `n_hard` counts the
negatives chosen for holding a token of the feature's; `width` is the tokens in a context; `making`
is the score on the contexts that the label was made from; far above `score`: memorised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """How labels are made and tested."""

    seed: int = 0
    """Seed of the split in halves, of the negatives and of the control's pairs."""
    pool_sequences: int = 128
    """Sequences encoded again on each side of the split, to know what is silent; 0 for none: then
    all negatives come from the sequences of the feature's own examples."""
    controls: int = 5
    """Other features whose rules are tried on each feature's contexts."""

    def __post_init__(self) -> None:
        if self.pool_sequences < 0 or self.controls < 0:
            raise UserError(
                "pool_sequences and controls of labels must be 0 or more; got "
                f"{self.pool_sequences} and {self.controls}."
            )

    def run_config(self, *, index: str, method: str, source: dict[str, Any]) -> dict[str, Any]:
        """The `config.json` of labels of an index (its manifest's hash)."""
        asked = {"kind": KIND, "schema": SCHEMA, "index": index, "method": method}
        return asked | {"source": source} | asdict(self)


def write_labels(run: Run, labels: pd.DataFrame, config: LabelConfig, *, device: str) -> None:
    """Write labels.parquet and complete the run."""
    ordered = labels.sort_values("feature")
    table = pa.Table.from_pandas(ordered, LABELS, preserve_index=False)
    with atomic_path(run.path / TABLE) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    run.finish(
        summary=summarise(labels),
        inputs={"index": run.config["index"]},
        seeds={"contexts": config.seed},
        device=device,
    )


def summarise(labels: pd.DataFrame) -> dict[str, Any]:
    """The few numbers that say how good a set of labels is."""
    scores, low, control = (
        labels[name].to_numpy(np.float64, na_value=np.nan)[labels["score"].notna().to_numpy()]
        for name in ("score", "score_low", "control")
    )
    found: dict[str, Any] = {"n_labelled": len(labels), "n_scored": len(scores)}
    if len(scores):
        tried = control[~np.isnan(control)]
        found |= {
            "median": float(np.median(scores)),
            "control": float(tried.mean()) if len(tried) else None,
            "clear": float((low > 0.5).mean()),
        }
        found |= {f"above_{bound}": float((scores > bound).mean()) for bound in (0.7, 0.8, 0.9)}
    return found


def read_labels(run: Run) -> pd.DataFrame:
    """The labels of a complete run, a row a labelled feature, by feature; columns are `LABELS`.

    Raises `UserError` where the run holds no labels, and `Failure` where it is not complete, of
    another schema, or its table is damaged.
    """
    if run.kind != KIND:
        raise UserError(
            f"a folder of labels was wanted and {run.path} is of kind {run.kind!r}; give one that "
            "`lorgnette label` printed."
        )
    if run.config.get("schema") != SCHEMA:
        raise Failure(
            f"the labels in {run.path} have schema {run.config.get('schema')!r} where this version "
            f"reads {SCHEMA}; delete them and run `lorgnette label {run.path.parent}` again."
        )
    recorded = run.manifest["files"].get(TABLE, {}).get("bytes")
    path = run.path / TABLE
    if not path.is_file() or path.stat().st_size != recorded:
        raise Failure(
            f"{path} is missing or not as it was written; delete {run.path} and run "
            f"`lorgnette label {run.path.parent}` again."
        )
    return pq.read_table(path).to_pandas()
