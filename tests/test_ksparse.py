"""The k-sparse study: its parts by hand and against numpy, its verdicts on made-up cells, a run."""

import gzip
import json
import math
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from test_cli import said

from analyses import ksparse, report, support_recovery
from analyses.denoising import DenoisingAutoencoder, DenoisingConfig, cross_entropy, fit_denoising
from analyses.images import ImageData, Images, load_images
from analyses.ksparse_cells import (
    Cell,
    CellResult,
    Variant,
    as_rows,
    filter_extent,
    kept_filters,
    measure_cell,
    with_alpha,
)
from analyses.ksparse_findings import tables, verdicts
from analyses.ksparse_measured import Config, Measured, spread
from analyses.linear_probes import Features, ProbeResult, probe_features, total_variance
from analyses.report import read_report
from probe.errors import Failure, UserError
from probe.loader import TensorSource
from probe.runs import find_runs, read_json, verify
from saes.activations import KSparse
from saes.models import SaeConfig, SparseAutoencoder
from saes.training import TrainConfig
from saes.types import Codes

SMALL = Config(
    units=24, ks=(2, 4, 8), small_ks=(2,), alphas=(1.0, 2.0), k_start=6, seeds=1, epochs=2,
    batch_size=32, trials=3,
)  # fmt: skip
OPTIONS = (
    "--units", "24", "--ks", "2", "4", "8", "--small-ks", "2", "--alphas", "1", "2",
    "--k-start", "6", "--seeds", "1", "--epochs", "2", "--batch-size", "32", "--trials", "3",
)  # fmt: skip
N_CELLS = 8
"""Pixels, PCA, untrained, denoising, and k = 2, 4, 8 and 2 without annealing."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files with 240 of scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("data") / "few-digits"
    folder.mkdir()
    rows, labels = load_digits(return_X_y=True)
    pixels = (np.asarray(rows)[:240] * 15).astype(np.uint8).tobytes()
    head = struct.pack(">BBBBIII", 0, 0, 8, 3, 240, 8, 8)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels))
    head = struct.pack(">BBBBI", 0, 0, 8, 1, 240)
    classes = np.asarray(labels)[:240].astype(np.uint8).tobytes()
    (folder / "train-labels-idx1-ubyte").write_bytes(head + classes)
    return folder


# ------------------------------------------------------------------------------ probes


def separable(n: int = 60) -> ImageData:
    """Images whose class is their brightest pixel."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    pixels = (rng.random((n, 3)) * 0.2 + np.eye(3)[labels]).astype(np.float32)
    parts = [
        Images(pixels=pixels[start : start + 20], labels=labels[start : start + 20])
        for start in range(0, n, 20)
    ]
    return ImageData(
        name="toy", source="", shape=(1, 3), checksum="",
        train=parts[0], validation=parts[1], test=parts[2],
    )  # fmt: skip


def of_pixels(data: ImageData, scale: float = 1.0) -> Features:
    return Features(
        train=data.train.pixels * np.float32(scale),
        validation=data.validation.pixels * np.float32(scale),
        test=data.test.pixels * np.float32(scale),
    )


def test_total_variance_of_dense_and_sparse_rows_is_numpys():
    rows = np.random.default_rng(0).random((30, 5)).astype(np.float32) + 3
    rows[rows < 3.4] = 0
    assert total_variance(rows) == pytest.approx(float(rows.var(0).sum()), rel=1e-5)
    assert total_variance(sparse.csr_array(rows)) == pytest.approx(total_variance(rows))
    assert total_variance(np.ones((4, 2), dtype=np.float32)) == 0.0


def test_a_probe_is_scikit_learns_at_the_strength_that_validation_prefers():
    data = load_images("digits")
    found = probe_features(of_pixels(data), data, strengths=(1e-4, 1.0))
    scale = data.train.pixels.var(0).sum() ** -0.5
    theirs = LogisticRegression(C=1.0, max_iter=300).fit(
        data.train.pixels * scale, data.train.labels
    )
    wrong = np.flatnonzero(theirs.predict(data.test.pixels * scale) != data.test.labels)
    assert found.strength == 1.0
    assert len(set(found.wrong) ^ set(wrong)) <= 1
    assert found.validation_error < 0.08


def test_of_equally_good_probes_the_most_penalised_is_kept():
    data = separable()
    found = probe_features(of_pixels(data), data, strengths=(100.0, 1.0, 10.0))
    assert (found.strength, found.validation_error, len(found.wrong)) == (1.0, 0.0, 0)


def test_a_probe_does_not_mind_the_scale_of_features():
    data = load_images("digits")
    a, b = (probe_features(of_pixels(data, scale), data, (1.0,)) for scale in (1.0, 64.0))
    assert np.array_equal(a.wrong, b.wrong)


def test_constant_features_are_probed_too():
    data = separable()
    dull = np.ones((20, 2), dtype=np.float32)
    found = probe_features(Features(train=dull, validation=dull, test=dull), data, (1.0,))
    assert 0.3 < found.validation_error < 1


# ------------------------------------------------------------------------------ rivals


def test_the_denoising_autoencoder_is_the_one_of_the_formula():
    model = DenoisingAutoencoder(4, 3, torch.Generator().manual_seed(0))
    x = torch.rand(5, 4)
    W = model.W.detach().numpy()
    hidden = 1 / (1 + np.exp(-(x.numpy() @ W.T)))
    assert np.allclose(model.encode(x).detach().numpy(), hidden, atol=1e-6)
    assert np.allclose(model(x).detach().numpy(), hidden @ W, atol=1e-6)


def test_cross_entropy_by_hand():
    # At logit 0 every pixel costs log 2, whatever it is; a certain right one nothing.
    logits = torch.tensor([[0.0, 0.0], [100.0, -100.0]])
    x = torch.tensor([[0.3, 1.0], [1.0, 0.0]])
    assert float(cross_entropy(logits, x)) == pytest.approx(math.log(2))


def denoising(lr: float) -> DenoisingConfig:
    train = TrainConfig(d_sae=16, steps=60, lr=lr, warmup_steps=5, normalize="none")
    return DenoisingConfig(noise=0.2, train=train)


def test_the_denoising_autoencoder_learns_and_repeats_itself():
    x = torch.from_numpy(load_images("digits").train.pixels)
    source = TensorSource(x, 64, seed=0)
    model, again = fit_denoising(source, denoising(0.02)), fit_denoising(source, denoising(0.02))
    untrained = DenoisingAutoencoder(64, 16, torch.Generator().manual_seed(0))
    before = cross_entropy(untrained(x).detach(), x)
    assert float(cross_entropy(model(x), x)) < 0.8 * float(before)
    assert torch.equal(model.W, again.W)


def test_a_diverging_denoising_autoencoder_says_so():
    source = TensorSource(torch.full((64, 4), torch.nan), 64, seed=0)
    with pytest.raises(Failure, match="learning rate below"):
        fit_denoising(source, denoising(0.02))


# ------------------------------------------------------------------------------ codes


def tied(k: int, weights: torch.Tensor) -> SparseAutoencoder:
    """An autoencoder of those weights [s, d] and no biases."""
    s, d = weights.shape
    config = SaeConfig(d_in=d, d_sae=s, activation=KSparse(k=k), tied=True)
    tensors = {"W_dec": weights, "b_enc": torch.zeros(s), "b_dec": torch.zeros(d)}
    return SparseAutoencoder.from_tensors(config, tensors)


def test_alpha_keeps_more_units_of_the_same_ones():
    sae = tied(2, torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))
    x = torch.rand(9, 5)
    few, many = sae.encode(x), with_alpha(sae, 2.5).encode(x)
    assert (few.values.shape[1], many.values.shape[1]) == (2, 5)
    assert torch.equal(few.values, many.values[:, :2])


@pytest.mark.parametrize("units", [8, 40])
def test_codes_become_rows_of_a_matrix(units):
    codes = Codes(
        values=torch.tensor([[2.0, -1.0], [0.5, 0.0], [0.0, 0.0]]),
        indices=torch.tensor([[3, 0], [0, 0], [0, 0]]),
    )
    rows = as_rows(codes, units)
    dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
    wanted = np.zeros((3, units))
    wanted[0, 3], wanted[0, 0], wanted[1, 0] = 2.0, -1.0, 0.5
    assert isinstance(rows, np.ndarray) == (units == 8)
    assert dense.tolist() == wanted.tolist()


def test_the_extent_of_filters_by_hand():
    assert filter_extent(torch.tensor([[1.0, 1.0, -1.0, 1.0]])) == 1.0
    assert filter_extent(torch.tensor([[0.0, 0.0, 3.0, 0.0]])) == 0.25
    # (1 + 4)^2 / (1 + 16) = 25 / 17 of 4 pixels; the mean with one of 4.
    both = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert filter_extent(both) == pytest.approx((25 / 17 / 4 + 1) / 2)
    assert math.isnan(filter_extent(both[:0]))


def test_filters_are_kept_from_the_most_to_the_least_active():
    sae = tied(1, torch.arange(4.0)[:, None].repeat(1, 2))
    assert kept_filters(sae, torch.tensor([5, 0, 9, 7]))[:, 0].tolist() == [2.0, 3.0, 0.0]
    assert kept_filters(sae, torch.zeros(4)).shape == (0, 2)


# ------------------------------------------------------------------------------ the theorem


def test_dictionaries_have_the_coherence_they_are_made_for():
    columns = support_recovery.adversarial_columns(3, 0.2)
    gram = (columns.T @ columns).numpy()
    assert np.allclose(np.diag(gram), 1)
    assert np.allclose(gram[:3, :3] - np.eye(3), -0.2 * (1 - np.eye(3)))
    assert np.allclose(gram[:3, 3], 0.2) and np.allclose(gram[4:, :4], 0)
    assert support_recovery.coherence(columns) == pytest.approx(0.2)
    rng = np.random.default_rng(0)
    clustered = support_recovery.clustered_columns(4096, 1.0, rng)
    same, other = (
        float(clustered[:, 0] @ clustered[:, 16]),
        float(clustered[:, 0] @ clustered[:, 1]),
    )
    assert same == pytest.approx(0.5, abs=0.05) and other == pytest.approx(0, abs=0.05)


def test_the_support_is_found_as_numpy_would():
    rng = np.random.default_rng(1)
    columns = support_recovery.unit_columns(rng.standard_normal((20, 30)))
    z = np.zeros((200, 30))
    for row in z:
        row[rng.choice(30, 3, replace=False)] = rng.uniform(1, 3, 3)
    largest = np.argsort(z @ columns.numpy().T @ columns.numpy(), axis=1)[:, -3:]
    wanted = [set(top) == set(np.flatnonzero(row)) for top, row in zip(largest, z, strict=True)]
    found = support_recovery.finds_support(columns, torch.from_numpy(z), 3)
    assert found.tolist() == wanted and 0 < sum(wanted) < 200


@pytest.mark.parametrize("k", [2, 5])
def test_the_worst_case_fails_just_where_the_proof_says(k):
    z = torch.zeros(1, support_recovery.N_COLUMNS, dtype=torch.float64)
    z[0, :k] = 1
    limit = 1 / (2 * k - 1)
    for mu, found in ((0.98 * limit, True), (1.02 * limit, False)):
        columns = support_recovery.adversarial_columns(k, mu)
        assert bool(support_recovery.finds_support(columns, z, k)) is found


def test_the_theorem_holds_wherever_it_speaks():
    trials = support_recovery.check_theorem(4, seed=1)
    missed, within = trials.errors(within=True)
    beyond_missed, beyond = trials.errors(within=False)
    assert missed == 0 and within > 50
    assert beyond_missed > 50 and within + beyond == len(trials.found)
    rates = support_recovery.recovery_rates(trials)
    for family, found in rates.items():
        assert sum(rate.n for _, rate in found) <= len(trials.of(family).found)
        assert all(rate.value == 1 for place, rate in found if place < 0.9)


# ------------------------------------------------------------------------------ verdicts

N_TEST = 100
CONFIG = Config(ks=(5, 25, 150), small_ks=(5,), alphas=(1.0, 2.0), seeds=3)


def made_up(cell: Cell, n_wrong: dict[float, int], dead: float = 0.0) -> CellResult:
    """A cell that gets the first images wrong, so many at each setting."""
    variants = tuple(
        Variant(
            setting=setting,
            probe=ProbeResult(strength=1.0, validation_error=n / N_TEST, wrong=np.arange(n)),
        )
        for setting, n in n_wrong.items()
    )
    facts = {"fvu": 0.2, "dead_share": dead, "extent": 0.1}
    return CellResult(cell=cell, variants=variants, facts=facts)


def measured(u_shaped: bool = True) -> Measured:
    """Three seeds alike, one of them with a dead unit more; errors by hand."""
    results = [made_up(Cell(method="pixels"), {0.0: 30}), made_up(Cell(method="pca"), {50.0: 28})]
    for seed in range(3):
        results += [
            made_up(Cell(method="untrained", seed=seed), {25.0: 20}),
            made_up(Cell(method="denoising", seed=seed), {0.0: 2}),
            made_up(Cell(method="k_sparse", seed=seed, k=5), {1.0: 50}, 0.6 + seed / 10),
        ]
        for k, plain, doubled in ((5, 40, 24), (25, 20, 10), (150, 25 if u_shaped else 9, 20)):
            cell = Cell(method="k_sparse", seed=seed, k=k, annealed=k < CONFIG.k_start)
            dead = 0.1 if k == 5 else 0.0
            results.append(made_up(cell, {1.0: plain, 2.0: doubled}, dead))
    trials = support_recovery.Trials(
        family=("gaussian",) * 3,
        condition=np.array([0.5, 1.0, 2.5]),
        found=np.array([True, True, False]),
    )
    return Measured(
        config=CONFIG, images="toy", source="made up", n=(70, 10, N_TEST), results=tuple(results),
        filters={"k = 5": np.ones((2, 3, 3))}, trials=trials,
    )  # fmt: skip


def test_verdicts_by_hand():
    found = {verdict.claim.split()[-1]: verdict for verdict in verdicts(measured())}
    values = [(round(v.value, 6), v.holds) for v in verdicts(measured())]
    assert values[:5] == [
        (10.0, True),  # k = 150 gets 20 % wrong, k = 25 10 %
        (20.0, True),  # pixels 30 %, k = 25 10 %
        (18.0, True),  # PCA
        (-8.0, False),  # the denoising one is better
        (10.0, True),  # untrained
    ]
    dead = found["k."]  # without annealing 60, 70 and 80 % dead, with it 10 %
    assert (dead.value, dead.holds) == (pytest.approx(60.0), True)
    assert (dead.low, dead.high) == (
        pytest.approx(35.159, abs=1e-3),
        pytest.approx(84.841, abs=1e-3),
    )
    alpha = found["1)."]  # (16 + 10 + 5) / 3 points
    assert (alpha.value, alpha.holds) == (pytest.approx(31 / 3), True)


def test_no_u_shape_without_a_turn():
    flat = verdicts(measured(u_shaped=False))[0]
    assert (flat.value, flat.holds) == (pytest.approx(-1.0), False)


def test_tables_by_hand():
    found = tables(measured())
    methods = {row["method"]: row for row in found["methods"].to_dict("records")}
    assert {name: row["error (%)"] for name, row in methods.items()} == {
        "raw pixels": 30.0, "PCA": 28.0, "untrained dictionary": 20.0,
        "denoising autoencoder": 2.0, "k-sparse autoencoder": 10.0,
    }  # fmt: skip
    assert methods["k-sparse autoencoder"]["chosen"] == "k 25, alpha 2"
    assert found["k_sweep"]["error, alpha 1 (%)"].tolist() == [40.0, 20.0, 25.0]
    assert found["alpha"]["alpha 2"].tolist() == [24.0, 10.0, 20.0]
    assert found["annealing"]["dead units (%)"].tolist() == pytest.approx([70.0, 10.0])
    theorem = found["theorem"]
    assert theorem["trials within"].tolist() == [2, 0, 0]
    assert theorem["errors beyond"].tolist() == [1, 0, 0]
    assert theorem["first error at condition"].tolist()[0] == 2.5


def test_every_figure_has_a_title_and_named_axes():
    for name, figure in ksparse.figures(measured()).items():
        layout = figure.to_dict()["layout"]
        assert layout["title"]["text"], name
        if name != "filters":
            assert layout["xaxis"]["title"]["text"], name


def test_spread_keeps_both_ends():
    assert spread((1, 2, 3, 4, 5, 6, 7), 4) == [1, 3, 5, 7]
    assert spread((1, 2), 4) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ks": ()}, "ks must be growing"),
        ({"ks": (5, 5)}, "ks must be growing"),
        ({"alphas": (1.0, 0.5)}, "alphas must be growing"),
        ({"alphas": (2.0,)}, "alphas must begin with 1"),
        ({"small_ks": (7,)}, "small_ks be among ks"),
        ({"units": 300}, "at most the number of units"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"noise": 1.0}, "noise must be"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Config(**changes)


# ------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def killed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which the command was killed once it had some cells."""
    root = tmp_path_factory.mktemp("ksparse") / "artifacts"
    command = [sys.executable, "-m", "app.cli", "analyse", "ksparse", "--images", str(images)]
    process = subprocess.Popen(
        [*command, *OPTIONS, "--root", str(root)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while len(list(root.glob("saes/ksparse/*/manifest.json"))) < 4:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return root


def analyse(capsys, root: Path, *options: str) -> tuple[int, str, str]:
    return said(capsys, "analyse", "ksparse", *options, *OPTIONS, "--root", str(root))


def test_a_killed_study_goes_on_and_its_report_is_whole(
    killed, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "CHROMIUM", tmp_path / "no-browser")
    done = {path: path.read_bytes() for path in killed.glob("saes/ksparse/*/manifest.json")}
    assert 4 <= len(done) < N_CELLS and not list(killed.glob("reports/*/*/manifest.json"))

    status, out, err = analyse(capsys, killed, "--images", str(images))
    assert status == 0, err
    assert all(path.read_bytes() == content for path, content in done.items())
    runs = find_runs(killed)
    assert all(run.complete and not verify(run) for run in runs)
    assert sorted(run.kind for run in runs) == ["ksparse_cell"] * N_CELLS + ["report"]

    (written,) = find_runs(killed, "report")
    assert out.strip() == str(written.path) and written.path.name.startswith("few-digits-")
    found = read_report(written.path)
    assert len(found.verdicts) == 8 and len(found.figures) == 7 and len(found.tables) == 5
    assert all(claim.claim[:20] in " ".join(err.split()) for claim in found.verdicts)
    assert "few-digits (train-images-idx3-ubyte.gz)" in found.text
    # No path of this machine goes into a report.
    for path in written.path.rglob("*"):
        assert path.is_dir() or str(images.parent).encode() not in path.read_bytes(), path

    # What was measured after the kill is what an uninterrupted study measures.
    data = load_images(str(images))
    cell = Cell(method="k_sparse", seed=0, k=4, annealed=True)
    alone, _ = measure_cell(cell, ksparse.make_settings(SMALL, data), tmp_path)
    there, _ = measure_cell(cell, ksparse.make_settings(SMALL, data), killed)
    for a, b in zip(alone.variants, there.variants, strict=True):
        assert (a.setting, a.probe.strength) == (b.setting, b.probe.strength)
        assert np.array_equal(a.probe.wrong, b.probe.wrong)

    # The same question finds the same report, from another place with the same images too.
    elsewhere = tmp_path / "few-digits"
    shutil.copytree(images, elsewhere)
    status, again, _ = analyse(capsys, killed, "--images", str(elsewhere))
    assert (status, again) == (0, out)
    assert read_json(written.path / "config.json")["images"] == data.checksum


def test_a_dry_run_names_images_sizes_and_time_and_writes_nothing(images, tmp_path, capsys):
    status, out, err = analyse(capsys, tmp_path / "x", "--images", str(images), "--dry-run")
    assert (status, out) == (0, "") and not (tmp_path / "x").exists()
    said_so = " ".join(err.split())
    assert "168 to train on, 24 to choose on, 48 to test on" in said_so
    assert "5: 24 units, 10 steps of 32 images each" in said_so and "min on one core" in said_so


def test_mistakes_in_the_command_are_one_sentence(images, tmp_path, capsys):
    root = ("--root", str(tmp_path / "x"))
    mistakes = {
        ("analyse", "ksparce", *OPTIONS): "'ksparce' is no study; wanted one of ",
        ("analyse", "ksparse", "--images", str(tmp_path)): "holds no images in IDX files",
        ("analyse", "ksparse", "--images", str(images), "--batch-size", "999"): "more than the 168",
        ("analyse", "ksparse", "--units", "9"): "at most the number of units",
    }
    for arguments, sentence in mistakes.items():
        status, out, err = said(capsys, *arguments, *root)
        assert (status, out) == (2, ""), err
        assert sentence in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_without_a_study_they_are_listed_and_help_teaches(capsys):
    status, out, _ = said(capsys, "analyse")
    assert status == 0 and "ksparse" in out and "linear probes" in out
    status, out, _ = said(capsys, "analyse", "ksparse", "--help")
    text = json.dumps(" ".join(out.split()))
    assert status == 0 and "lorgnette analyse ksparse --images" in text
    assert "--anneal-share" in text and "The paper: the first half" in text and "--root" in text
