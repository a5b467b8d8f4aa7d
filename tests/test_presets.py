"""The published settings of SDXL-Turbo's SAEs: each arrives, fitted to the site's width."""

import json
from pathlib import Path

import pytest
import torch
from image_index_tree import make_store

from app.cli import dispatch
from app.commands import sweep, train
from probe.runs import Run
from saes.folder import load_sae
from saes.presets import PRESETS, fitted

WIDTH, ROWS = 16, 20 * 16


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("preset")
    return str(make_store(folder, images=20, sites=("down.2.1", "up.0.0")).run.path)


def made(capsys, *arguments: str) -> list[Run]:
    assert dispatch(arguments) == 0, capsys.readouterr().err
    return [Run.open(Path(line)) for line in capsys.readouterr().out.splitlines()]


def test_the_published_numbers() -> None:
    preset = PRESETS["sdxl-turbo"]
    assert (preset.width, preset.train.d_sae, preset.batch_size) == (1280, 5120, 4096)
    assert preset.train.dead_after_tokens // preset.batch_size == 2441
    assert preset.train.steps * preset.batch_size == 1_500_000 * 256
    assert fitted(preset, preset.train, (), width=7, batches=3) == preset.train
    whole = fitted(preset, preset.train, ("d_sae", "k_aux", "steps"), width=1280, batches=None)
    assert whole == preset.train


def test_every_setting_arrives(tmp_path, store, capsys) -> None:
    assert train.default(["STORE", "--preset", "sdxl-turbo"]).batch_size == 4096
    (run,) = made(
        capsys, "train", store, "--site", "down.2.1", "--preset", "sdxl-turbo",
        "--batch-size", "64", "--device", "cpu", "--root", str(tmp_path),
    )  # fmt: skip
    options = dict(run.config["train"])
    assert options.pop("activation") == {"name": "topk", "k": 10, "multi": False}
    n_train = ROWS - 16
    assert options == {
        "d_sae": 4 * WIDTH, "k_aux": 3, "steps": n_train // 64, "normalize": "none", "lr": 1e-4,
        "warmup_steps": 0, "decay_share": 0.0, "betas": [0.9, 0.999], "eps": 6.25e-10,
        "auxk_alpha": 1 / 32, "dead_after_tokens": 10_000_000, "encoder_dtype": "float32",
        "init_rows": 32_768, "seed": 0, "log_every": 10, "checkpoint_every": 250,
    }  # fmt: skip
    sae = load_sae(run.path)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones(64))
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["lr"] == 1e-4 and run.summary["l0"] <= 10


def test_named_options_count_all_the_same(tmp_path, store, capsys) -> None:
    (run,) = made(
        capsys, "train", store, "--site=up.0.0", "--preset=sdxl-turbo", "--d-sae", "24", "--k", "4",
        "--steps=2", "--lr", "0.001", "--batch-size", "32", "--device", "cpu",
        "--root", str(tmp_path),
    )  # fmt: skip
    options = run.config["train"]
    assert (options["d_sae"], options["steps"], options["lr"]) == (24, 2, 0.001)
    assert (options["k_aux"], options["activation"]["k"]) == (3, 4)
    assert options["eps"] == 6.25e-10 and options["normalize"] == "none"


def test_a_sweep_of_k_and_width(tmp_path, store, capsys) -> None:
    assert sweep.default(["STORE", "--preset", "sdxl-turbo"]).activations == ("topk:k=10",)
    asked = ("--preset", "sdxl-turbo", "--batch-size", "64", "--device", "cpu", "--steps", "3")
    root = ("--root", str(tmp_path))
    runs = made(
        capsys, "sweep", store, *asked, "--activations", "topk:k=2,4", "--widths", "20", "40",
        *root,
    )  # fmt: skip
    found = [
        (run.config["site"], run.config["train"]["activation"]["k"], run.config["train"]["d_sae"])
        for run in runs
    ]
    assert found == [
        (site, k, width) for site in ("down.2.1", "up.0.0") for k in (2, 4) for width in (20, 40)
    ]
    assert {run.config["train"]["k_aux"] for run in runs} == {3}
    (alone,) = made(
        capsys, "train", store, "--site", "up.0.0", *asked, "--d-sae", "40", "--k", "4",
        "--order-seed", "0", *root,
    )  # fmt: skip
    assert alone.path == runs[-1].path, "the sweep's SAE is the one that train makes alone"
    assert dispatch(("sweep", store, *asked, "--widths", "20", "20", *root)) == 2
    assert "--widths must be one or more, each once" in capsys.readouterr().err
    assert dispatch(("sweep", store, *asked, "--widths", "20", "30", "--dry-run", *root)) == 0
    assert "4: 1 activations, 2 widths, 1 seeds, 2 sites" in capsys.readouterr().err
