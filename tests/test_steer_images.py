"""Recipes of images from the shell and at a page: the bits that Python gives, and what is told."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import BLOCKS, ImageTree, make_image_tree
from PIL import Image

from app import live_steering
from app.cli import dispatch
from app.drawings import png, side_by_side, slug
from probe.diffusion import DrawConfig
from probe.runs import Run, verify
from saes.drawing import prepare
from saes.recipe_making import feature_recipe
from saes.recipes import Positions, Strength, read_recipe, to_json, write_recipe

PROMPT, BLOCK = "a <b>red</b> circle", BLOCKS[0]
MASK = ((0.0, 1.0, 0.0, 0.0),) * 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("steer"))


@pytest.fixture(scope="module")
def file(tree, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "brush.json"
    recipe = feature_recipe(
        tree.saes[BLOCK], 5, strength=Strength(value=20.0, unit="mean"), name="A brush",
        draw=DrawConfig(steps=2), positions=Positions(named=None, mask=MASK),
    )  # fmt: skip
    write_recipe(recipe, path)
    return path


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


def test_shell_page_and_python_give_the_same_bits(tree, file, capsys, monkeypatch):
    where = ["--root", str(tree.root), "--device", "cpu"]
    asked = ["steer", str(file), "--prompt", PROMPT, "a boat", "--seed", "1", "2", *where]
    assert dispatch(asked) == 0
    shown = capsys.readouterr().out
    run = Run.open(Path(shown.splitlines()[-1]))
    assert run.complete and run.kind == "drawing" and not verify(run)
    assert run.path.parent == tree.root / "drawings" and run.path.name.startswith("a-brush-")
    rows = json.loads((run.path / "moved.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (PROMPT, 1), (PROMPT, 2), ("a boat", 1), ("a boat", 2),
    ]  # fmt: skip

    drawn = prepare(read_recipe(file), root=tree.root, model=tree.model).compare(
        [PROMPT, "a boat"], [1, 2]
    )
    monkeypatch.setenv("LORGNETTE_ROOT", str(tree.root))
    document = json.loads(file.read_text())
    for i, row in enumerate(rows):
        folder = run.path / row["folder"]
        at_page = live_steering.drawn(document, file.parent, row["prompt"], row["seed"])
        for name, ours, theirs in (
            ("before", drawn.before[i], at_page.before[0]),
            ("after", drawn.after[i], at_page.after[0]),
        ):
            assert torch.equal(pixels(folder / f"{name}.png"), ours)
            assert torch.equal(theirs, ours)
        both = pixels(folder / "both.png")
        assert both.shape == (32, 68, 3) and torch.equal(both[:, 36:], drawn.after[i])
    for name in ("whole", "inside", "outside"):
        assert [row[name] for row in rows] == pytest.approx(drawn.moved()[name].tolist())
        assert f"{rows[0][name]:.3g}" in shown
    doses = live_steering.doses(document, file.parent, PROMPT, 1, [0.0, 1.0])
    assert torch.equal(doses.after[0], drawn.before[0])
    assert torch.equal(doses.after[1], drawn.after[0])
    assert doses.moved()["whole"].tolist() == pytest.approx([0, drawn.moved()["whole"][0]])


def test_the_same_question_finds_its_folder(tree, file, capsys):
    asked = ["steer", str(file), "--prompt", "x", "--root", str(tree.root), "--device", "cpu"]
    assert dispatch(asked) == 0
    first = Path(capsys.readouterr().out.splitlines()[-1])
    written = (first / "manifest.json").stat().st_mtime_ns
    assert dispatch(asked) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    (row,) = json.loads((first / "moved.json").read_text())
    assert row["seed"] == 42, "where nobody says a seed"
    (first / "manifest.json").unlink()
    assert dispatch([*asked, "--times", "2"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]) != first
    assert dispatch(asked) == 0 and (first / "manifest.json").is_file()


def test_a_plan_draws_nothing(tree, file, capsys):
    asked = ["steer", str(file), "--prompt", "x", "y", "--root", str(tree.root / "none")]
    assert dispatch([*asked, "--seed", "1", "2", "3", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "6 (3 seeds a prompt)" in told.err and "2 an image" in told.err
    assert "add feature 5 of main at down.2.1, strength 20 x mean" in told.err
    assert "18 PNG" in told.err and not told.out and not (tree.root / "none").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "x", "--chat"], "draws images and does not take --chat"),
        (["--prompt", "x", "--temperature", "1", "--out", "o"], "does not take --out, --temper"),
        ([], "has no prompts of its own"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tree, file, capsys, options, sentence):
    assert dispatch(["steer", str(file), *options, "--root", str(tree.root)]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1
    assert not list(tree.root.rglob("*.tmp"))


def test_pictures_as_files():
    picture = torch.arange(24 * 40 * 3).reshape(24, 40, 3).to(torch.uint8)
    assert torch.equal(pixels_of(png(picture)), picture)
    small = pixels_of(png(picture, pixels=20))
    assert small.shape == (12, 20, 3)
    mean = picture[:2, :2].double().mean((0, 1))
    assert (small[0, 0].double() - mean).abs().max() <= 0.51
    assert torch.equal(pixels_of(png(picture, pixels=400)), picture)
    both = side_by_side(picture, picture)
    assert both.shape == (24, 84, 3) and (both[:, 40:44] == 255).all()
    assert slug("A red, <b>circle</b>!") == "a-red-b-circle-b"
    assert slug("¿?") == "" and len(slug("a" * 99)) == 40


def pixels_of(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data))))


def test_a_recipe_of_texts_takes_no_options_of_images(tree, tmp_path, capsys):
    document = to_json(
        feature_recipe(tree.saes[BLOCK], 5, strength=Strength(value=1.0), draw=DrawConfig())
    )
    for key in ("draw", "seeds"):
        del document[key]
    document["edits"][0]["site"], document["schema"] = "resid_post.0", 1
    (tmp_path / "t.json").write_text(json.dumps(document))
    for options, sentence in (
        (["--images-at-once", "2"], "is of texts and does not take --images-at-once"),
        (["--seed", "1", "2"], "a text is drawn from one seed; got 2"),
    ):
        assert dispatch(["steer", str(tmp_path / "t.json"), "--prompt", "x", *options]) == 2
        assert sentence in capsys.readouterr().err
