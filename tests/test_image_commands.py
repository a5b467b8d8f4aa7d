"""The commands that take any SAE, on one of an image model: done, or refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_index_tree import D_SAE, SITE, ImageTree, make_image_tree

from app.cli import dispatch
from probe.runs import Run
from saes.feature_queries import FeatureIndex
from saes.folder import load_sae, sae_metadata
from saes.label_schema import read_labels
from saes.scales import load_scales


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("commands"))


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    status = dispatch(arguments)
    out, err = capsys.readouterr()
    return status, out.strip(), " ".join(err.split())


def test_through_the_format_of_sdxl_unbox_and_back(tree, tmp_path, capsys):
    root = ("--root", str(tree.root))
    out = tmp_path / "unet.down_blocks.2.attentions.1_k4_hidden40_auxk8_bs64_lr0.003" / "final"
    status, written, err = said(
        capsys, "convert", str(tree.sae.path), "--to", "sdxl-unbox", "--out", str(out), *root
    )
    assert status == 0, err
    folder = Path(written)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "state_dict.pth", "mean.pt", "std.pt",
    }  # fmt: skip
    (index,) = tree.sae.path.glob("index-*")
    mean = FeatureIndex.open(index).numbers()["mean"].fillna(0).to_numpy()
    np.testing.assert_allclose(torch.load(folder / "mean.pt").numpy(), mean, rtol=1e-6)
    status, back, err = said(
        capsys, "convert", str(folder), "--store", str(tree.store), "--name", "back", *root
    )
    assert status == 0, err
    ours = Run.open(Path(back))
    assert ours.config["site"] == SITE == sae_metadata(ours.path)["site"]
    assert ours.config["model"] == tree.sae.config["model"]
    first, second = load_sae(tree.sae.path), load_sae(ours.path)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    scales = load_scales(ours.path)
    assert scales is not None and np.allclose(scales.mean.numpy(), mean)
    status, again, err = said(
        capsys, "index", str(ours.path), "--store", str(tree.store), "--top", "8", "--device",
        "cpu", *root,
    )  # fmt: skip
    assert status == 0, err
    assert FeatureIndex.open(Path(again)).of_images


def test_labels_by_the_command(tree, tmp_path, capsys):
    root = ("--root", str(tree.root))
    status, out, err = said(
        capsys, "label", str(tree.sae.path), "--pool-sequences", "10", "--device", "cpu", *root
    )
    assert status == 0, err
    labels = read_labels(Run.open(Path(out)))
    assert len(labels) <= D_SAE and set(labels["method"]) == {"offline"}
    file = tmp_path / "labels.csv"
    file.write_text("feature,label\n3,a red boat\n")
    status, out, err = said(
        capsys, "label", str(tree.sae.path), "--method", "file", "--file", str(file), *root
    )
    assert status == 0, err
    (row,) = read_labels(Run.open(Path(out))).to_dict("records")
    assert (row["feature"], row["label"]) == (3, "a red boat") and np.isnan(row["score"])


def test_what_is_for_text_alone_is_refused_in_a_sentence(tree, tmp_path, capsys):
    sae, root = str(tree.sae.path), ("--root", str(tree.root))
    endpoint = ("--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "m")
    mistakes = {
        ("label", sae, "--method", "endpoint", *endpoint): "cannot be shown to an endpoint",
        ("convert", sae, "--to", "neuronpedia"): "Neuronpedia shows text",
        ("convert", sae, "--to", "delphi", "--name", "x"): "delphi explains text",
        ("analyse", "benchmark", "--sae", sae): "ask for --suites matching coherence",
    }
    for arguments, sentence in mistakes.items():
        status, out, err = said(capsys, *arguments, *root)
        assert (status, out) == (2, "") and sentence in err, (arguments, err)
        assert "Traceback" not in err and err.count("lorgnette") >= 1
    left = {path.name for path in tree.root.iterdir()}
    assert left == {"activations", "saes"}, "nothing half-written is left"


def test_compare_and_map(tree, capsys):
    root = ("--root", str(tree.root))
    status, out, err = said(capsys, "compare", str(tree.sae.path), str(tree.sae.path), *root)
    assert status == 0, err
    assert Run.open(Path(out)).summary["mean_cosine"] == pytest.approx(1)
    status, out, err = said(capsys, "map", str(tree.sae.path), *root)
    assert status == 0, err
