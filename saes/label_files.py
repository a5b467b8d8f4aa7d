"""Labels that somebody else made, from a CSV, JSON or Parquet file: columns `feature`, `label`."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from probe.errors import UserError

NAMED = 5
"""Offending rows that a message names."""


def read_label_file(path: Path, n_features: int) -> dict[int, str]:
    """Labels by feature, as the file gives them.

    JSON is a list of objects with `feature` and `label`, or one object from feature to label. Other
    columns are ignored. Raises `UserError` where the file is not there or is none of these, names a
    feature that does not exist or one twice, or holds an empty label.
    """
    table = _read(path)
    if not {"feature", "label"} <= set(table.columns):
        raise UserError(
            f"{path} must have the columns feature and label; it has "
            f"{', '.join(map(str, table.columns)) or 'none'}."
        )
    named = table["feature"].tolist()
    unknown = [name for name in named if number_of(name, n_features) is None]
    having = f"it has 0 to {n_features - 1}"
    _refuse(path, unknown, f"names features that this SAE does not have: {{}}; {having}")
    numbers = [int(float(str(name))) for name in named]
    twice = [number for number, n in Counter(numbers).items() if n > 1]
    _refuse(path, twice, "labels features twice: {}; keep one label each")
    texts = ["" if pd.isna(text) else " ".join(str(text).split()) for text in table["label"]]
    empty = [number for number, text in zip(numbers, texts, strict=True) if not text]
    _refuse(path, empty, "has no label for features {}; write one or leave them out")
    if not numbers:
        raise UserError(f"{path} holds no label; write a row for each labelled feature.")
    return dict(zip(numbers, texts, strict=True))


def number_of(name: object, n_features: int) -> int | None:
    """A feature's number as a table writes it (7, 7.0, "7"); None where there is no such one."""
    try:
        number = float(str(name))
    except ValueError:
        return None
    return int(number) if number.is_integer() and 0 <= number < n_features else None


def _refuse(path: Path, rows: Sequence[object], sentence: str) -> None:
    if rows:
        named = ", ".join(map(str, rows[:NAMED])) + (" ..." if len(rows) > NAMED else "")
        raise UserError(f"{path} {sentence.format(named)}.")


def _read(path: Path) -> pd.DataFrame:
    readers = {".csv": pd.read_csv, ".json": _read_json, ".parquet": pd.read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"a file of labels ends in {', '.join(readers)}; got {path}.")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give one with the columns feature and label.")
    try:
        return readers[path.suffix.lower()](path)
    except (ValueError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as {path.suffix[1:].upper()} ({said}); "
            "give a table with the columns feature and label."
        ) from error


def _read_json(path: Path) -> pd.DataFrame:

    document = json.loads(path.read_text())
    if isinstance(document, dict):
        document = [{"feature": feature, "label": label} for feature, label in document.items()]
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise ValueError("neither a list of rows nor an object from feature to label")
    return pd.DataFrame(document)
