"""Many at once: each SAE of a sweep is the one that `lorgnette train` makes alone."""

import json
from pathlib import Path

import pytest
import torch
from artifact_tree import LINES, make_model

from app.cli import dispatch
from app.commands.sweep import parse_activations
from probe.errors import UserError
from probe.runs import Run
from saes.activations import BatchTopK, JumpRelu, Matryoshka, TopAfa, TopK
from saes.folder import load_sae

SMALL = ("--d-sae", "32", "--steps", "6", "--batch-size", "64", "--warmup-steps", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny local model and a corpus."""
    folder = tmp_path_factory.mktemp("sweep")
    make_model(folder / "tiny")
    rows = [json.dumps({"id": str(i), "text": LINES[i % len(LINES)]}) for i in range(64)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> str:
    """A store of two sites."""
    arguments = ["capture", str(place / "tiny"), str(place / "corpus.jsonl"), "--context", "32"]
    sites = ["--sites", "resid_post.0", "mlp_out.1", "--dtype", "float32"]
    assert dispatch([*arguments, *sites, "--root", str(place / "artifacts")]) == 0
    (folder,) = (place / "artifacts" / "activations").iterdir()
    return str(folder)


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Run]:
    """The runs whose folders a command names."""
    assert dispatch(arguments) == 0
    return [Run.open(Path(line)) for line in capsys.readouterr().out.splitlines()]


def assert_same(sweep: Run, alone: Run) -> None:
    assert sweep.path.name == alone.path.name
    assert sweep.config == alone.config
    ours, theirs = load_sae(sweep.path).tensors(), load_sae(alone.path).tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_grid_on_a_store_equals_each_alone(place, store, capsys):
    found = made(
        capsys, "sweep", store, "--activations", "topk:k=2,4", "top_afa:afa=1/10", "--seeds", "0",
        "3", *SMALL, "--root", str(place / "artifacts"),
    )  # fmt: skip
    assert len(found) == 2 * 3 * 2 and all(run.complete for run in found)
    assert len({run.path for run in found}) == len(found)
    (place / "alone").mkdir()
    (place / "alone" / "activations").symlink_to(place / "artifacts" / "activations")
    asked = {"topk": ("--k", "4"), "top_afa": ("--activation", "top_afa", "--afa", "0.1")}
    for site, name, seed in (("resid_post.0", "topk", "3"), ("mlp_out.1", "top_afa", "0")):
        (alone,) = made(
            capsys, "train", store, "--site", site, *asked[name], "--seed", seed, "--order-seed",
            "0", *SMALL, "--root", str(place / "alone"),
        )  # fmt: skip
        (ours,) = [run for run in found if run.path.name == alone.path.name]
        assert_same(ours, alone)


def test_sites_of_a_model_are_captured_together(place, capsys, monkeypatch):
    from probe import loader

    passes = []
    capture_rows = loader.capture_rows

    def counted(model, batch, sites, dtype):
        passes.append(tuple(map(str, sites)))
        return capture_rows(model, batch, sites, dtype)

    monkeypatch.setattr(loader, "capture_rows", counted)
    model, corpus = str(place / "tiny"), str(place / "corpus.jsonl")
    streamed = ("--corpus", corpus, "--context", "32", "--buffer-rows", "128", *SMALL)
    sites = ("resid_post.0", "mlp_out.1")
    found = made(
        capsys, "sweep", model, *streamed, "--sites", *sites, "--activations", "batch_topk:k=4",
        "--root", str(place / "streamed"),
    )  # fmt: skip
    assert set(passes) == {sites}
    together = len(passes)
    for run, site in zip(found, sites, strict=True):
        passes.clear()
        (alone,) = made(
            capsys, "train", model, *streamed, "--site", site, "--activation", "batch_topk", "--k",
            "4", "--root", str(place / "one by one"),
        )  # fmt: skip
        assert_same(run, alone)
        assert len(passes) == together  # for one site as many passes of the model as for both


def test_a_dry_run_counts_and_writes_nothing(place, store, capsys):
    before = sorted((place / "artifacts").rglob("*"))
    arguments = ["sweep", store, "--activations", "relu:l1=0.1,0.2", "--seeds", "5", "6", "7"]
    assert dispatch([*arguments, "--dry-run", "--root", str(place / "artifacts")]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "12: 2 activations, 3 seeds, 2 sites" in err
    assert sorted((place / "artifacts").rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--activations", "topp"), "is no activation; wanted one of topk"),
        (("--activations", "topk:l1=3"), "is no option with values; topk has k=..., multi=..."),
        (("--activations", "topk:k"), "is no option with values"),
        (("--activations", "topk:k=many"), "is no value; wanted a whole number"),
        (("--activations", "topk:k=4,4"), "each once"),
        (("--activations", "topk:k=0"), "at least 1"),
        (("--activations", "topk:k=99"), "cannot be active"),
        (("--seeds", "1", "1"), "each once"),
        (("--sites", "resid_post.9"), "is not"),
        (("--batch-size", "0"), "at least 1"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, place, store, capsys):
    root = ("--root", str(place / "mistakes"))
    assert dispatch(["sweep", store, "--d-sae", "32", *arguments, *root]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and "Traceback" not in err
    assert not (place / "mistakes" / "saes").exists()


def test_a_model_needs_sites(place, capsys):
    assert dispatch(["sweep", str(place / "tiny"), "--corpus", str(place / "corpus.jsonl")]) == 2
    assert "needs --sites" in capsys.readouterr().err


def test_terms() -> None:
    assert parse_activations("topk") == [TopK()]
    assert parse_activations("batch_topk:k=2,3") == [BatchTopK(k=2), BatchTopK(k=3)]
    assert parse_activations("topk:k=2:multi=true,false") == [TopK(k=2, multi=True), TopK(k=2)]
    assert parse_activations("top_afa:afa=1/32") == [TopAfa(afa=1 / 32)]
    assert parse_activations("matryoshka:prefixes=8/16,4") == [
        Matryoshka(prefixes=(8, 16)), Matryoshka(prefixes=(4,)),
    ]  # fmt: skip
    assert parse_activations("jump_relu:l0=1e-3,1e-2:bandwidth=0.5,1") == [
        JumpRelu(l0=l0, bandwidth=bandwidth) for l0 in (1e-3, 1e-2) for bandwidth in (0.5, 1.0)
    ]
    with pytest.raises(UserError, match="wanted true or false"):
        parse_activations("topk:multi=maybe")
