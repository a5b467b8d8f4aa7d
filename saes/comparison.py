"""Two SAEs side by side: which features both have, which only one has, and what chance would match.

Decoder rows are compared, by `saes.matching` (Paulo and Belrose 2025, 2501.16615). Features that
never fire on an index, and rows of zeros, are left out: a dead feature keeps the direction that
training began with, and two SAEs that began with the same seed would be found to share it. `shaped`
directions of chance have the mean and the covariance of the second SAE's own (`saes.chance`): two
dictionaries that only fill the same few dimensions do not match beyond them.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from probe.errors import UserError
from probe.runs import Run
from saes import chance
from saes.comparison_tables import write_table
from saes.matching import HUNGARIAN_LIMIT, Matching, match_decoders

SCHEMA = 1
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """How two SAEs are matched."""

    limit: int = HUNGARIAN_LIMIT
    """Features of the larger SAE up to which pairs are assigned optimally, in cubic time; beyond,
    pairs that are each other's nearest are taken."""
    seed: int = 0
    """Seed of the directions of chance."""

    def run_config(
        self, *, first: str, second: str, indexes: tuple[str | None, str | None]
    ) -> dict[str, Any]:
        """The run's config: hashes of both SAEs' weights and of their indexes' manifests."""
        asked = {"first": first, "second": second, "indexes": list(indexes)}
        return {"kind": "match", "schema": SCHEMA, **asked, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dictionary:
    """One side of a comparison."""

    decoder: Float[np.ndarray, "s d"]
    """Rows of `W_dec`, of any length."""
    alive: Bool[np.ndarray, " s"] | None = None
    """Whether each feature fires at all; None where no index says."""

    def directions(self) -> Float[np.ndarray, "s d"]:
        """Rows at unit length, those of dead features zero."""
        rows = chance.unit(self.decoder)
        return rows if self.alive is None else rows * self.alive[:, None]


def compare(
    run: Run,
    first: Dictionary,
    second: Dictionary,
    config: CompareConfig,
    *,
    progress: bool = True,
) -> Run:
    """Fill the folder of a comparison.

    Raises `UserError` where the widths differ or one has no direction at all.
    """
    a, b = first.directions(), second.directions()
    check_widths(a.shape[1], b.shape[1])
    living = b[np.linalg.norm(b, axis=1) > 0]
    n, d = living.shape
    with run.lock(), tqdm(total=3, desc="matching", unit=" pairs", disable=not progress) as shown:
        matched = _match(a, b, config, shown)
        controls = {
            "random": _match(a, chance.isotropic(n, d, config.seed), config, shown),
            "shaped": _match(a, chance.shaped(living, config.seed), config, shown),
        }
        pairs = {
            "first": matched.first.numpy().astype(np.int32),
            "second": matched.second.numpy().astype(np.int32),
            "cosine": matched.cosines.numpy(),
        }
        write_table(run, "pairs", pd.DataFrame(pairs))
        write_table(run, "nearest", pd.concat([_nearest("first", a, b), _nearest("second", b, a)]))
        write_table(run, "chance", pd.concat([_chance(*control) for control in controls.items()]))
        run.finish(
            summary={
                "n_first": matched.n_first,
                "n_second": matched.n_second,
                "left_out_first": len(a) - matched.n_first,
                "left_out_second": len(b) - matched.n_second,
                **matched.summary(),
                "n_same_number": int((matched.first == matched.second).sum()),
                "chance": {name: control.summary() for name, control in controls.items()},
            },
            inputs={name: run.config[name] for name in ("first", "second")},
            seeds={"chance": config.seed},
            device="cpu",
        )
    return run


def check_widths(first: int, second: int) -> None:
    """Raises `UserError` where two SAEs' directions have no common width."""
    if first != second:
        raise UserError(
            f"two SAEs of one width are compared and these read widths {first} and {second}; "
            "choose two of one model's sites that are equally wide."
        )


def nearest(
    rows: Float[np.ndarray, "n d"], among: Float[np.ndarray, "m d"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """For each row, the one of `among` with the largest |cos|, and that cosine with its sign."""
    places, cosines = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE] @ among.T
        best = np.abs(block).argmax(1)
        places.append(best)
        cosines.append(np.take_along_axis(block, best[:, None], 1)[:, 0])
    return np.concatenate(places), np.concatenate(cosines).clip(-1, 1)


def _match(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], config: CompareConfig, shown: tqdm
) -> Matching:
    found = match_decoders(torch.from_numpy(a), torch.from_numpy(b), limit=config.limit)
    shown.update()
    return found


def _nearest(
    side: str, rows: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]
) -> pd.DataFrame:
    features = np.flatnonzero(np.linalg.norm(rows, axis=1) > 0)
    numbers = np.flatnonzero(np.linalg.norm(others, axis=1) > 0)
    places, cosines = nearest(rows[features], others[numbers])
    return pd.DataFrame(
        {
            "side": side,
            "feature": features.astype(np.int32),
            "other": numbers[places].astype(np.int32),
            "cosine": cosines,
        }
    )


def _chance(name: str, matched: Matching) -> pd.DataFrame:
    measures = {"pair": matched.cosines.abs().numpy(), "nearest": matched.nearest.numpy()}
    return pd.concat(
        pd.DataFrame({"control": name, "measure": measure, "cosine": values})
        for measure, values in measures.items()
    )
