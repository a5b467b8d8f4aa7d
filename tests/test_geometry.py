"""The shape of activations: measures by hand and by definition, and the study of stores."""

import shutil

import numpy as np
import pytest
import torch
from artifact_tree import SITE

from analyses import geometry as study
from analyses.cells import Frame
from analyses.geometry import Config
from analyses.geometry_measures import (
    cka,
    collision_share,
    geometry,
    mean_cosine,
    nearest_distances,
)
from analyses.report import read_report
from probe.errors import UserError
from probe.runs import find_runs


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_ranks_by_hand():
    # Four points on two axes: singular values sqrt(8) and sqrt(2), variances 8 and 2.
    x = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    found = geometry(x)
    share = np.array([2, 1]) / 3
    assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found.participation_ratio == pytest.approx(100 / 68)
    assert found.rows == 4 and found.collisions == 0


def test_a_round_cloud_has_its_width_as_rank_and_no_direction():
    found = geometry(rows(4000, 8))
    assert found.effective_rank == pytest.approx(8, rel=0.01)
    assert found.participation_ratio == pytest.approx(8, rel=0.01)
    assert found.anisotropy == pytest.approx(0, abs=0.01)
    assert geometry(rows(4000, 8) + 10).anisotropy > 0.98


def test_mean_cosine_is_the_mean_over_pairs():
    x = rows(7, 3)
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_nearest_rows_are_those_of_a_loop():
    x = rows(40, 5).double()
    nearest, median = nearest_distances(x)
    every = torch.cdist(x, x) + torch.diag(torch.full((40,), torch.inf, dtype=torch.float64))
    torch.testing.assert_close(nearest, every.amin(1))
    assert median == pytest.approx(float(every[torch.isfinite(every)].median()))


def test_collisions_count_rows_that_a_format_cannot_tell_apart():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.001, 2.0], [1.1, 2.0]])
    assert collision_share(x) == 0.75, "1 and 1.001 are the same bfloat16"
    assert collision_share(x, torch.float32) == 0.5


def test_cka_of_turned_and_scaled_rows_is_one_and_of_unrelated_ones_nothing():
    x = rows(300, 12)
    turn, _ = torch.linalg.qr(rows(12, 12, seed=1))
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-6)
    assert abs(cka(x, rows(300, 40, seed=2))) < 0.05
    assert abs(cka(rows(60, 500), rows(60, 500, seed=2))) < 0.1, "wider than there are rows"
    half = torch.cat([x, rows(300, 12, seed=3)], dim=1)
    assert 0.3 < cka(x, half) < 0.9
    assert cka(x, half) == pytest.approx(cka(half, x))


def test_too_little_to_look_at_is_refused():
    with pytest.raises(ValueError, match="three rows or more"):
        geometry(rows(2, 3))
    with pytest.raises(ValueError, match="all rows are the same"):
        geometry(torch.ones(5, 3))
    with pytest.raises(ValueError, match="four rows or more"):
        cka(rows(3, 3), rows(3, 3))


# ----------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def root(browsed, tmp_path_factory):
    """The shared tree's store twice, under two names."""
    made = tmp_path_factory.mktemp("geometry")
    (store,) = find_runs(browsed.root, "activations")
    for name in ("first-00000000", "second-00000000"):
        shutil.copytree(store.path, made / "activations" / name)
    return made


def test_the_study_of_a_store(root):
    names = ("first-00000000", "second-00000000", "first-00000000")
    config = Config(stores=names, rows=300)
    run = study.run(config, root)
    report = read_report(run.path)
    shapes: Frame = report.tables["shapes"]
    likeness: Frame = report.tables["likeness"]
    assert run.complete and set(report.figures) == {"shapes_by_site", "likeness"}
    assert set(shapes["of"]) == {"activations", "normal rows"} and set(shapes["site"]) == {SITE}
    assert len(likeness) == 1 and likeness["cka"][0] == pytest.approx(1), "the same rows"
    assert likeness["shuffled"][0] < 0.5 and likeness["rows"][0] == 300
    by = shapes.groupby("of")["participation_ratio"].mean()
    assert by["normal rows"] == pytest.approx(by["activations"], rel=0.3)
    assert study.run(config, root).path == run.path


def test_what_the_study_cannot_do_is_said(root, tmp_path):
    with pytest.raises(UserError, match="no activation store was given"):
        study.estimate(Config())
    with pytest.raises(UserError, match="--rows must be 16 or more"):
        study.estimate(Config(stores=("x",), rows=3))
    with pytest.raises(UserError, match="nothere is no activation store"):
        study.run(Config(stores=("nothere",)), tmp_path)
