"""The shape of activation stores: how many directions they use, how alike their rows are.

For every site of every store (of images every denoising step too): effective rank, participation
ratio, anisotropy, collisions, nearest neighbours; and between any two of them that read the same
rows, CKA (`analyses.geometry_measures`). Two layers of a store, two steps of a drawing, or two
checkpoints that read the same corpus are compared alike: rows belong together where sequence,
position and token are the same.

Controls: the store of a random-weight twin, where one is named; CKA with the rows of one side
shuffled; and normal rows of the same mean and covariance, which have the same effective rank and
participation ratio and show what of nearest neighbours and anisotropy these alone explain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from analyses.cells import Frame, Tables, kept
from analyses.geometry_measures import Geometry, cka, geometry
from analyses.plots import Axis, Line, heat_maps, panels
from analyses.report import Report, Verdict
from analyses.statistics import Estimate
from probe.errors import UserError
from probe.runs import MANIFEST, Run, find_runs, sha256_file
from probe.store import ActivationStore

__all__ = ["Config", "estimate", "figures", "measure", "run"]

CELL, SCHEMA = "geometry_cell", 1
LEAST = 16
"""Rows that two clouds must share to be compared, and that one must have."""
MIXED = 2654435761
"""Knuth's multiplier: a row's place in the sample depends on its sequence and position alone, so
that stores of the same text are sampled alike."""
WORDS = {
    "effective_rank": "Effective rank",
    "participation_ratio": "Participation ratio",
    "anisotropy": "Anisotropy",
    "anisotropy_centred": "Anisotropy, centred",
    "collisions": "Collisions",
    "nearest": "Nearest neighbour",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many directions do activations use, and how alike are layers, steps, checkpoints?

    Effective rank, participation ratio, anisotropy, collisions and nearest neighbours of every site
    of some stores, and the CKA of any two that read the same text (or drew the same images).

    Example: lorgnette analyse geometry --stores artifacts/activations/smollm2-builtin-*
    """

    stores: tuple[str, ...] = ()
    """Activation stores, folders or names below <root>/activations."""
    rows: int = 4096
    """Rows looked at of each site."""
    seed: int = 0
    """Decides the shuffles and the normal rows; which rows are taken, sequence and position do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """Some rows of one site."""

    store: str
    """The store's name."""
    site: str
    """The site; of images with the denoising step, where there are several."""
    keys: Int[Tensor, " n"]
    """Which rows, by sequence and position; ascending."""
    tokens: Int[Tensor, " n"]
    """Their tokens."""
    values: Float[Tensor, "n d"]
    """The rows."""

    @property
    def name(self) -> str:
        """The store and the site."""
        return f"{self.site} of {self.store}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured."""

    config: Config
    """What was asked."""
    shapes: Frame
    """A row a cloud: `store`, `site`, `of` (`activations` or `normal rows`), the measures."""
    likeness: Frame
    """A row a pair of clouds: `a`, `b` (their names), `rows`, `cka`, `shuffled`."""


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    check(config)
    return {
        "stores": ", ".join(config.stores),
        "rows": f"{config.rows:,} of each site",
        "memory": f"{3 * 8 * config.rows**2 / 1e6:,.0f} MB, and the rows",
        "time": "some seconds a site, a second a pair of sites",
    }


def check(config: Config) -> None:
    """Raise `UserError` where the options do not make a study."""
    if not config.stores:
        raise UserError("no activation store was given; name one or more with --stores.")
    if config.rows < LEAST:
        raise UserError(f"--rows must be {LEAST} or more, got {config.rows}.")


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, root: Path) -> Measured:
    """Measure every cloud and pair that is not measured yet.

    Raises `UserError` where a store is not there, `Failure` where one is incomplete or damaged.
    """
    check(config)
    stores = find_stores(config, root)
    asked = {"kind": CELL, "schema": SCHEMA, "rows": config.rows, "seed": config.seed}
    made = kept(
        root, "geometry", asked | {"part": "geometry", "stores": checksums(stores)},
        lambda: measure_clouds(stores, config),
    )  # fmt: skip
    return Measured(config=config, shapes=made["shapes"], likeness=made["likeness"])


def find_stores(config: Config, root: Path) -> list[ActivationStore]:
    """The stores that the options name, each once. Raises as `find_store` does."""
    found = [find_store(name, root) for name in config.stores]
    return list({store.run.path.name: store for store in found}.values())


def checksums(stores: Sequence[ActivationStore]) -> dict[str, str]:
    """The SHA-256 of each store's manifest, which stands for its every byte."""
    return {store.run.path.name: sha256_file(store.run.path / MANIFEST) for store in stores}


def find_store(name: str, root: Path) -> ActivationStore:
    """A store by its folder or its name. Raises `UserError` where there is none."""
    path = Path(name) if Path(name).is_dir() else root / "activations" / name
    if not path.is_dir():
        there = ", ".join(run.path.name for run in find_runs(root, "activations")) or "none yet"
        raise UserError(f"{name} is no activation store; below {root} there are: {there}.")
    return ActivationStore.open(path)


def read_clouds(store: ActivationStore, config: Config) -> Iterator[Cloud]:
    """The sampled rows of every site, of images of every step.

    Raises `UserError` where there are too few rows.
    """
    places = row_places(store)
    for step in sorted(places["step"].unique()):
        rows = places[places["step"] == step].nsmallest(config.rows, "mixed").sort_values("key")
        if len(rows) < LEAST:
            raise UserError(f"{store.run.path} has {len(rows)} rows; {LEAST} or more are wanted.")
        for site in store.sites:
            many = places["step"].nunique() > 1
            yield Cloud(
                store=store.run.path.name,
                site=f"{site}, step {step}" if many else site,
                keys=torch.tensor(rows["key"].to_numpy()),
                tokens=torch.tensor(rows["token"].to_numpy()),
                values=read_rows(store, site, rows),
            )


def row_places(store: ActivationStore) -> Frame:
    """Where each row of a store is: `shard`, `row`, `key`, `token`, `step`, `mixed`."""
    frames = []
    for number in range(store.n_shards):
        shard = store.shard(number, store.sites[0])
        images = shard.in_images
        sequence = shard.sequence if images is None else 2 * images.image + images.conditional
        frames.append(
            pd.DataFrame(
                {
                    "shard": number, "row": np.arange(len(shard.token)),
                    "key": (sequence.long() * 2**20 + shard.position.long()).numpy(),
                    "token": shard.token.long().numpy(),
                    "step": 0 if images is None else images.step.numpy(),
                }
            )
        )  # fmt: skip
    places = pd.concat(frames, ignore_index=True)
    return places.assign(mixed=(places["key"] + 1) * MIXED % 2**32)


def read_rows(store: ActivationStore, site: str, rows: Frame) -> Float[Tensor, "n d"]:
    """Some rows of a site, in the order given."""
    values = torch.empty(len(rows), store.d(site))
    shards = rows["shard"].to_numpy()
    for number in np.unique(shards):
        here = np.flatnonzero(shards == number)
        wanted = torch.tensor(rows["row"].to_numpy()[here])
        values[torch.tensor(here)] = store.values(int(number), site)[wanted].float()
    return values


def measure_clouds(stores: Sequence[ActivationStore], config: Config) -> Tables:
    """Tables `shapes` and `likeness`."""
    clouds = [cloud for store in stores for cloud in read_clouds(store, config)]
    generator = torch.Generator().manual_seed(config.seed)
    shapes = []
    for cloud in tqdm(clouds, desc="shapes", unit="site", leave=False):
        normal = normal_rows(cloud.values, generator)
        for of, values in (("activations", cloud.values), ("normal rows", normal)):
            described = {"store": cloud.store, "site": cloud.site, "of": of}
            shapes.append(described | asdict(geometry(values)))
    pairs = [(a, b) for i, a in enumerate(clouds) for b in clouds[i + 1 :]]
    likeness = [
        _alike(a, b, generator) for a, b in tqdm(pairs, desc="CKA", unit="pair", leave=False)
    ]
    columns = ["a", "b", "rows", "cka", "shuffled"]
    return {"shapes": pd.DataFrame(shapes), "likeness": pd.DataFrame(likeness, columns=columns)}


def normal_rows(x: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """As many normal rows of the same mean and covariance."""
    mean = x.mean(0)
    mixing = torch.randn(len(x), len(x), generator=generator) / len(x) ** 0.5
    return mixing @ (x - mean) + mean


def _alike(a: Cloud, b: Cloud, generator: torch.Generator) -> dict[str, str | int | float]:
    """CKA of the rows that two clouds share; nan where they share too few."""
    _, in_a, in_b = np.intersect1d(a.keys.numpy(), b.keys.numpy(), return_indices=True)
    same = (a.tokens[in_a] == b.tokens[in_b]).numpy()
    x, y = a.values[in_a[same]], b.values[in_b[same]]
    found = {"a": a.name, "b": b.name, "rows": len(x)}
    if len(x) < LEAST:
        return found | {"cka": float("nan"), "shuffled": float("nan")}
    shuffled = y[torch.randperm(len(y), generator=generator)]
    return found | {"cka": cka(x, y), "shuffled": cka(x, shuffled)}


# ------------------------------------------------------------------------------------- reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run. Raises as `measure` does."""
    check(config)
    stores = find_stores(config, root)
    hashes = checksums(stores)
    asked = {
        "kind": "report", "schema": 1, "study": "geometry", "stores": hashes, "rows": config.rows,
        "seed": config.seed,
    }  # fmt: skip
    name = stores[0].run.path.name.rsplit("-", 1)[0]
    folder = Run.create(root / "reports" / "geometry", name, asked)
    with folder.lock():
        if not folder.complete:
            report = make_report(measure(config, root))
            report.write(folder, inputs=hashes, seeds={"seed": config.seed})
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title="The shape of activations",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        tables={"shapes": measured.shapes, "likeness": measured.likeness},
        figures=figures(measured),
    )


def verdicts(measured: Measured) -> list[Verdict]:
    """Are rows more alike than their covariance explains, and pairs more than shuffled ones?"""
    found = []
    by = measured.shapes.pivot(index=["store", "site"], columns="of", values="nearest")
    nearer = (by["activations"] < by["normal rows"]).mean()
    found.append(
        Verdict(
            claim="Rows have nearer neighbours than normal rows of the same covariance.",
            statistic="share of the sites", value=float(nearer), low=None, high=None,
            holds=bool(nearer > 0.5),
        )
    )  # fmt: skip
    pairs = measured.likeness.dropna(subset=["cka"])
    if len(pairs):
        above = (pairs["cka"] > pairs["shuffled"].max()).mean()
        found.append(
            Verdict(
                claim="Sites that read the same rows are more alike than with rows shuffled.",
                statistic="share of the pairs whose CKA is above every shuffled one",
                value=float(above), low=None, high=None, holds=bool(above > 0.5),
            )
        )  # fmt: skip
    return found


def text(measured: Measured) -> str:
    """What was done, and how to read it."""
    return (
        f"{measured.config.rows:,} rows of each site, the same of every store of the same text. "
        "Effective rank is exp of the entropy of the centred rows' singular values; anisotropy the "
        "mean cosine of two rows; collisions the share of rows that another is equal to in "
        "bfloat16; nearest neighbour the median distance to it over the median distance of two "
        "rows. Normal rows have the same mean and covariance. CKA is linear and unbiased, about 0 "
        "for unrelated rows (shuffled) and 1 for rows that differ by a rotation and a scale. Rows "
        "of one sequence are not independent, and no interval is given."
    )


def figures(measured: Measured) -> dict[str, go.Figure]:
    """Shapes by site, and who is like whom."""
    made = {"shapes_by_site": shape_figure(measured)}
    if measured.likeness["cka"].notna().any():
        made["likeness"] = likeness_figure(measured)
    return made


def shape_figure(measured: Measured) -> go.Figure:
    """Every measure by site, in the stores' order."""
    shown: dict[str, list[Line]] = {}
    for field in fields(Geometry):
        if field.name == "rows":
            continue
        for (store, of), rows in measured.shapes.groupby(["store", "of"], sort=False):
            name = store if of == "activations" else f"{store}, {of}"
            values = [Estimate(value=float(v), low=None, high=None, n=1) for v in rows[field.name]]
            line = Line(name=name, x=list(range(len(values))), y=values)
            shown.setdefault(WORDS[field.name], []).append(line)
    figure = panels(shown, title="The shape of activations", x=Axis(title="Site"), y=Axis(title=""))
    sites = list(dict.fromkeys(measured.shapes["site"]))
    figure.update_xaxes(showticklabels=False)
    figure.update_xaxes(
        showticklabels=True, tickvals=list(range(len(sites))), ticktext=sites, tickangle=60, row=2
    )
    return figure


def likeness_figure(measured: Measured) -> go.Figure:
    """CKA of every pair."""
    names = list(dict.fromkeys([*measured.likeness["a"], *measured.likeness["b"]]))
    values = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(values, 1.0)
    for row in measured.likeness.to_dict("records"):
        i, j = names.index(row["a"]), names.index(row["b"])
        values[i, j] = values[j, i] = row["cka"]
    figure = heat_maps(
        {"": values}, title="CKA of sites that read the same rows", x=Axis(title=""),
        y=Axis(title=""), columns=list(range(len(names))), amount="CKA", limits=(0.0, 1.0),
    )  # fmt: skip
    short = [name.split(" of ")[0] for name in names]
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=short)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=short)
    figure.update_layout(height=max(480, 26 * len(names) + 180))
    return figure
