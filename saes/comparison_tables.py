"""The tables of a comparison of two SAEs, on disk.

    pairs.parquet     a row a matched pair: first, second, cosine (with its sign)
    nearest.parquet   a row a feature of either: side ("first", "second"), feature, other, cosine
                      (with its sign) of the direction of the other SAE that is nearest by |cos|
    chance.parquet    |cos| of the first SAE's directions with directions of chance, of the second's
                      number: control ("random", "shaped"), measure ("pair", "nearest"), cosine

Apart from `saes.comparison`, which needs PyTorch: who only reads need not wait for it.
"""

from collections.abc import Mapping
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from probe.errors import Failure
from probe.runs import Run, atomic_path

Name = Literal["pairs", "nearest", "chance"]
NAMES: tuple[Name, ...] = ("pairs", "nearest", "chance")


def write_table(run: Run, name: Name, frame: pd.DataFrame) -> None:
    """Write one of the tables."""
    with atomic_path(run.path / f"{name}.parquet") as temporary:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table, temporary, compression="zstd")


def read_comparison(run: Run) -> Mapping[Name, pd.DataFrame]:
    """The three tables. Raises `Failure` where the run is not complete or a file is damaged."""
    _ = run.manifest
    try:
        return {name: pq.read_table(run.path / f"{name}.parquet").to_pandas() for name in NAMES}
    except (OSError, pa.ArrowInvalid) as error:
        raise Failure(
            f"the comparison in {run.path} cannot be read ({str(error).splitlines()[0]}); delete "
            "it and run `lorgnette compare` again."
        ) from error
