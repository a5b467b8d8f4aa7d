"""Recipes of images against the same interventions written out by hand with plain hooks."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from image_tree import BLOCKS, D_SAE, WIDTH, ImageTree, K, make_image_tree, make_sae
from torch import Tensor

from probe.diffusion import DrawConfig
from probe.errors import Failure, UserError
from probe.sites import parse_site
from saes import steering
from saes.drawing import Drawing, on_grid, prepare
from saes.folder import load_sae
from saes.place_codes import codes_of_image
from saes.recipe_making import feature_recipe, icon_recipe
from saes.recipes import Strength, read_recipe, recipe_from, to_json, write_recipe
from saes.scales import load_scales

PROMPT, OTHER, SEED = "a red circle", "two blue boats", 7
BLOCK = BLOCKS[0]
STEPS = DrawConfig(steps=2)
GUIDED = DrawConfig(steps=2, guidance=4.0)
MASK = [[0, 0, 0, 0], [0, 1, 0.5, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
WEIGHTS = torch.tensor(MASK).flatten()[:, None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("images"))


def document(tree: ImageTree, *edits: dict, draw: DrawConfig = STEPS, **more) -> dict:
    """A recipe as JSON; what its edits do not say is of `BLOCK` and its SAE."""
    base = feature_recipe(tree.saes[BLOCK], 3, strength=Strength(value=1.0), draw=draw)
    whole = to_json(base) | more
    whole["edits"] = [{"site": BLOCK} | edit for edit in edits] or whole["edits"]
    return whole


def ready(tree: ImageTree, *edits: dict, draw: DrawConfig = STEPS, **more) -> Drawing:
    recipe = recipe_from(document(tree, *edits, draw=draw, **more))
    return prepare(recipe, root=tree.root, model=tree.model)


def encode(tree: ImageTree, x: Tensor, block: str = BLOCK) -> Tensor:
    """The published formula, densely: ReLU of the k largest pre-activations."""
    w = load_sae(tree.saes[block].path)
    pre = (x - w.b_dec) @ w.W_enc + w.b_enc
    kept = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())


def decoder(tree: ImageTree, block: str = BLOCK) -> Tensor:
    return load_sae(tree.saes[block].path).W_dec


Change = Callable[[Tensor, int], Tensor]


def by_hand(
    tree: ImageTree,
    changes: dict[str, Change],
    draw: DrawConfig = STEPS,
    prompt: str = PROMPT,
) -> Tensor:
    """Latents with a block's output replaced by input + change(output - input [b, t, d], step)."""
    handles = []
    for name, change in changes.items():
        passes = iter(range(draw.steps))

        def hook(_, args, output, change=change, passes=passes):
            entering = args[0]
            update = (output[0] - entering).flatten(2).transpose(1, 2)
            new = change(update, next(passes)).transpose(1, 2).reshape(entering.shape)
            return (entering + new, *output[1:])

        handles.append(tree.model.block(parse_site(name)).register_forward_hook(hook))
    drawn = tree.model.generate([prompt], [SEED], draw)
    for handle in handles:
        handle.remove()
    return drawn.latents


def by_recipe(drawing: Drawing, prompt: str = PROMPT) -> Tensor:
    from probe.interventions import applying

    with applying(drawing.model, drawing.edits([SEED])):
        return drawing.model.generate([prompt], [SEED], drawing.config).latents


def assert_same(found: Tensor, wanted: Tensor, plain: Tensor) -> None:
    """Equal but for rounding, which is small beside what the edit does."""
    effect = (wanted - plain).abs().max()
    assert effect > 5e-4, "the edit changes something"
    assert (found - wanted).abs().max() <= min(2e-4, 0.05 * effect)


def plain(tree: ImageTree, draw: DrawConfig = STEPS) -> Tensor:
    return tree.model.generate([PROMPT], [SEED], draw).latents


def updates(tree: ImageTree, prompt: str, draw: DrawConfig = STEPS, block: str = BLOCK) -> Tensor:
    """What a block adds, at every step: [s, b, t, d], by a hook of our own."""
    seen: list[Tensor] = []
    handle = tree.model.block(parse_site(block)).register_forward_hook(
        lambda _, args, out: seen.append((out[0] - args[0]).flatten(2).transpose(1, 2))
    )
    tree.model.generate([prompt], [SEED], draw)
    handle.remove()
    return torch.stack(seen)


def strongest(tree: ImageTree, prompt: str = PROMPT) -> int:
    """A feature that fires on the image."""
    return int(encode(tree, updates(tree, prompt)[0]).sum((0, 1)).argmax())


def feature(number: int, **more) -> dict:
    return {"target": {"feature": number, "sae": "main"} | more}


# ------------------------------------------------------------------------------- operations


def test_modulate(tree):
    number, beta = strongest(tree), 5.0
    drawing = ready(tree, {"op": "scale", "strength": 1 + beta} | feature(number))
    f = decoder(tree)[number]

    def change(x: Tensor, step: int) -> Tensor:
        return x + beta * encode(tree, x)[..., number : number + 1] * f

    assert_same(by_recipe(drawing), by_hand(tree, {BLOCK: change}), plain(tree))


def test_paint_with_the_means_that_came_with_the_sae(tree):
    scales = load_scales(tree.saes[BLOCK].path)
    assert scales is not None
    edit = {"op": "add", "strength": {"value": 10.0, "unit": "mean"}, "positions": {"mask": MASK}}
    drawing = ready(tree, edit | feature(5))
    added = WEIGHTS * float(scales.mean[5]) * 10.0 * decoder(tree)[5]
    wanted = by_hand(tree, {BLOCK: lambda x, _: x + added})
    assert_same(by_recipe(drawing), wanted, plain(tree))
    of_own = edit | feature(5, statistics={"mean": 2.0, "max": 9.0, "sd": 1.0})
    added = WEIGHTS * 2.0 * 10.0 * decoder(tree)[5]
    wanted = by_hand(tree, {BLOCK: lambda x, _: x + added})
    assert_same(by_recipe(ready(tree, of_own)), wanted, plain(tree))


@pytest.mark.parametrize("gamma", [0.5, 1.5])
def test_the_icon_of_a_feature_is_the_feature_alone(tree, gamma):
    recipe = icon_recipe(tree.saes[BLOCK], 5, gamma)
    assert recipe.prompts == ("",) and recipe.seeds == (42,)
    drawing = prepare(recipe, root=tree.root, model=tree.model)
    scales = load_scales(tree.saes[BLOCK].path)
    assert scales is not None
    said = gamma * K * float(scales.mean[5]) * decoder(tree)[5]
    wanted = by_hand(tree, {BLOCK: lambda x, _: said.expand_as(x)}, DrawConfig(), "")
    unchanged = tree.model.generate([""], [SEED]).latents
    assert_same(by_recipe(drawing, ""), wanted, unchanged)


def test_reconstruct(tree):
    b_dec = load_sae(tree.saes[BLOCK].path).b_dec
    drawing = ready(tree, {"op": "reconstruct", "target": {"sae": "main"}})
    wanted = by_hand(tree, {BLOCK: lambda x, _: encode(tree, x) @ decoder(tree) + b_dec})
    assert_same(by_recipe(drawing), wanted, plain(tree))


def test_ablate_a_block(tree):
    drawing = ready(tree, {"op": "zero", "target": "site"})
    assert_same(by_recipe(drawing), by_hand(tree, {BLOCK: lambda x, _: 0 * x}), plain(tree))


def test_set_clamp_and_zero_of_a_feature(tree):
    number = strongest(tree)
    f = decoder(tree)[number]
    for edit, new in (
        ({"op": "set", "strength": 3.0}, lambda a: 0 * a + 3),
        ({"op": "clamp", "strength": 0.2}, lambda a: a.clamp(max=0.2)),
        ({"op": "zero"}, lambda a: 0 * a),
    ):

        def change(x: Tensor, _: int, new=new) -> Tensor:
            a = encode(tree, x)[..., number : number + 1]
            return x + (new(a) - a) * f

        found = by_recipe(ready(tree, edit | feature(number)))
        assert_same(found, by_hand(tree, {BLOCK: change}), plain(tree))


@pytest.mark.parametrize("steps", [[0, 1], [1, 2], [1, None]])
def test_a_range_of_steps(tree, steps):
    drawing = ready(tree, {"op": "scale", "strength": 9.0, "target": "site", "steps": steps})
    inside = range(*(steps[0], steps[1] or 2))
    wanted = by_hand(tree, {BLOCK: lambda x, step: 9 * x if step in inside else x})
    assert_same(by_recipe(drawing), wanted, plain(tree))


def test_patch_of_a_block_at_masked_places(tree):
    edit = {"op": "patch", "target": "site", "source": OTHER, "positions": {"mask": MASK}}
    other = updates(tree, OTHER)
    wanted = by_hand(tree, {BLOCK: lambda x, step: x + WEIGHTS * (other[step] - x)})
    assert_same(by_recipe(ready(tree, edit)), wanted, plain(tree))


def test_an_image_patched_from_itself_is_itself(tree):
    edits = [
        {"op": "patch", "target": "site", "source": PROMPT, "site": str(site)}
        for site in tree.model.sites()
    ]
    found = by_recipe(ready(tree, *edits))
    torch.testing.assert_close(found, plain(tree), atol=1e-4, rtol=1e-4)


def test_patch_of_features(tree):
    numbers = [strongest(tree, OTHER), 3, 11]
    edit = {"op": "patch", "target": {"features": numbers, "sae": "main"}, "source": OTHER}
    other = encode(tree, updates(tree, OTHER))[..., numbers]
    W = decoder(tree)[numbers]
    wanted = by_hand(
        tree, {BLOCK: lambda x, step: x + (other[step] - encode(tree, x)[..., numbers]) @ W}
    )
    assert_same(by_recipe(ready(tree, edit)), wanted, plain(tree))


def test_transport_adds_what_the_source_says(tree):
    numbers = [strongest(tree, OTHER), 11]
    edit = {
        "op": "transport", "target": {"features": numbers, "sae": "main"}, "source": OTHER,
        "strength": 2.0, "positions": {"mask": MASK},
    }  # fmt: skip
    other = encode(tree, updates(tree, OTHER))[..., numbers]
    W = decoder(tree)[numbers]
    wanted = by_hand(tree, {BLOCK: lambda x, step: x + WEIGHTS * (2 * other[step] @ W)})
    assert_same(by_recipe(ready(tree, edit)), wanted, plain(tree))


def test_neurons_of_a_feed_forward_layer(tree):
    path = "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0"
    edit = {
        "site": f"module:{path}", "op": "scale", "strength": -2.0, "target": {"neurons": [3, 1]},
        "positions": {"mask": MASK},
    }  # fmt: skip
    drawing = ready(tree, edit)

    def hook(_, args, output):
        new = output.clone()
        new[..., [1, 3]] *= 1 - 3 * WEIGHTS
        return new

    handle = tree.model.parts.get_submodule(path).register_forward_hook(hook)
    wanted = plain(tree)
    handle.remove()
    assert_same(by_recipe(drawing), wanted, plain(tree))


# --------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("rows", ["conditional", "both", "opposed"])
def test_rows_of_guided_images(tree, rows):
    edit = {"op": "add", "strength": 4.0, "rows": rows} | feature(5)
    drawing = ready(tree, edit, draw=GUIDED)
    signs = {"conditional": [0, 1], "both": [1, 1], "opposed": [-1, 1]}[rows]
    signed = torch.tensor(signs)[:, None, None] * 4 * decoder(tree)[5]
    wanted = by_hand(tree, {BLOCK: lambda x, _: x + signed}, GUIDED)
    assert_same(by_recipe(drawing), wanted, plain(tree, GUIDED))


def test_each_row_is_modulated_by_its_own_code(tree):
    number = strongest(tree)
    edit = {"op": "scale", "strength": 4.0, "rows": "opposed"} | feature(number)
    signs = torch.tensor([-1, 1])[:, None, None]

    def change(x: Tensor, _: int) -> Tensor:
        return x + signs * 3 * encode(tree, x)[..., number : number + 1] * decoder(tree)[number]

    found = by_recipe(ready(tree, edit, draw=GUIDED))
    assert_same(found, by_hand(tree, {BLOCK: change}, GUIDED), plain(tree, GUIDED))


@pytest.mark.parametrize("rows", ["conditional", "both"])
def test_guided_rows_are_patched_from_rows_of_their_own(tree, rows):
    edit = {"op": "patch", "target": "site", "source": OTHER, "rows": rows}
    other = updates(tree, OTHER, GUIDED)
    assert not torch.allclose(other[1, 0], updates(tree, PROMPT, GUIDED)[1, 0], atol=1e-3)

    def change(x: Tensor, step: int) -> Tensor:
        return other[step] if rows == "both" else torch.cat([x[:1], other[step, 1:]])

    found = by_recipe(ready(tree, edit, draw=GUIDED))
    assert_same(found, by_hand(tree, {BLOCK: change}, GUIDED), plain(tree, GUIDED))


# ---------------------------------------------------------------------------------- several


def test_a_batch_holds_the_images_drawn_alone(tree):
    """Also where an edit takes from another prompt, whose activations depend on the seed."""
    edit = {"op": "patch", "target": "site", "source": OTHER, "positions": {"mask": MASK}}
    drawing = ready(tree, edit)
    alone = drawing.compare([PROMPT, OTHER], [1, 2])
    together = drawing.compare([PROMPT, OTHER], [1, 2], at_once=3)
    assert alone.prompts == (PROMPT, PROMPT, OTHER, OTHER) and alone.seeds == (1, 2, 1, 2)
    assert (alone.after.int() - together.after.int()).abs().max() <= 1
    assert torch.equal(alone.after[1], drawing.compare([PROMPT], [2]).after[0])
    assert torch.equal(alone.before[3], tree.model.generate([OTHER], [2], STEPS).images[0])


def test_how_far_images_move_inside_and_outside_the_mask(tree):
    edit = {"op": "add", "strength": 40.0, "positions": {"mask": MASK}} | feature(5)
    drawn = ready(tree, edit).compare([PROMPT], [SEED])
    change = (drawn.after[0].double() - drawn.before[0].double()).abs().mean(-1)
    weights = torch.tensor(MASK).repeat_interleave(8, 0).repeat_interleave(8, 1).double()
    assert torch.equal(drawn.mask.double(), weights)
    (row,) = drawn.moved().to_dict("records")
    assert row["whole"] == pytest.approx(float(change.mean()))
    assert row["inside"] == pytest.approx(float((change * weights).sum() / weights.sum()))
    outside = 1 - weights
    assert row["outside"] == pytest.approx(float((change * outside).sum() / outside.sum()))
    everywhere = ready(tree).compare([PROMPT], [SEED]).moved()
    assert bool(everywhere["outside"].isna().all())


def test_a_row_of_doses(tree):
    drawing = ready(tree, {"op": "add", "strength": 8.0} | feature(5))
    row = drawing.dose_row(PROMPT, SEED, [0.0, 0.5, 1.0])
    assert torch.equal(row[0], tree.model.generate([PROMPT], [SEED], STEPS).images[0])
    half = ready(tree, {"op": "add", "strength": 4.0} | feature(5))
    assert torch.equal(row[1], half.draw([PROMPT], [SEED])[0])
    assert torch.equal(row[2], drawing.compare([PROMPT], [SEED]).after[0])
    moved = ready(tree, {"op": "transport", "target": "site", "source": OTHER, "strength": 1.0})
    row = moved.dose_row(PROMPT, SEED, [0.0, 2.0])
    assert torch.equal(row[1], moved.draw([PROMPT], [SEED], times=2.0)[0])


def test_heat_maps_are_the_codes_at_their_places(tree):
    drawing = ready(tree, {"op": "set", "strength": 3.0} | feature(5))
    codes = drawing.codes(PROMPT, SEED, "main")
    dense = encode(tree, updates(tree, PROMPT))[:, 0]
    number = strongest(tree)
    torch.testing.assert_close(
        codes.heat_map(number), dense[..., number].reshape(2, 4, 4), atol=1e-4, rtol=1e-4
    )
    found = codes.strongest(3, step=1)
    wanted = dense[1].mean(0).sort(descending=True)
    assert found["feature"].tolist() == wanted.indices[:3].tolist()
    torch.testing.assert_close(
        torch.tensor(found["mean"].to_numpy()).float(), wanted.values[:3], atol=1e-4, rtol=1e-4
    )
    shares = (dense[1] > 0).double().mean(0)[wanted.indices[:3]]
    assert found["share"].tolist() == pytest.approx(shares.tolist())
    assert codes.image is not None
    assert torch.equal(codes.image, tree.model.generate([PROMPT], [SEED], STEPS).images[0])
    edited = drawing.codes(PROMPT, SEED, "main", edited=True)
    assert not torch.equal(edited.heat_map(5), codes.heat_map(5))
    short = codes_of_image(
        tree.model, drawing.saes["main"].sae, parse_site(BLOCK), PROMPT, SEED, STEPS, draw=False
    )
    assert short.image is None and torch.equal(short.values, codes.values)


# ------------------------------------------------------------------------------------ masks


def test_a_canvas_is_averaged_over_the_area_of_each_place(tree):
    canvas = torch.zeros(32, 32)
    canvas[8:20, 8:16] = 1
    mask = torch.zeros(4, 4)
    mask[1, 1], mask[2, 1] = 1.0, 0.5
    torch.testing.assert_close(on_grid(canvas, (4, 4), "it"), mask)
    finer = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(on_grid(mask, (8, 8), "it"), finer)
    edit = {"op": "zero", "target": "site"}
    painted = ready(tree, edit | {"positions": {"canvas": canvas.tolist()}})
    masked = ready(tree, edit | {"positions": {"mask": mask.tolist()}})
    assert torch.equal(by_recipe(painted), by_recipe(masked))
    wide = ready(
        tree,
        edit | {"positions": {"canvas": torch.ones(4, 8).tolist()}},
        draw=DrawConfig(height=32, width=64),
    )
    assert wide.masks[0] is not None and wide.masks[0].shape == (4, 8)
    with pytest.raises(UserError, match="the canvas is 2 by 3 and the feature map 4 by 4"):
        on_grid(torch.ones(2, 3), (4, 4), "it")


# ----------------------------------------------------------------------------------- the file


def test_a_recipe_of_images_is_written_and_read_back(tree, tmp_path):
    parts = [
        {"op": "add", "strength": {"value": 1.5, "unit": "mean"}, "rows": "opposed"} | feature(1),
        {"op": "scale", "strength": 3.0, "steps": [1, 2]} | feature(2),
        {"op": "zero", "target": "site", "positions": {"mask": MASK}, "rows": "both"},
        {"op": "zero", "target": {"neurons": [4, 2]}, "positions": {"canvas": MASK}},
        {"op": "patch", "target": "site", "source": OTHER},
        {"op": "transport", "target": {"features": [3, 1], "sae": "main"}, "source": "",
         "strength": -1.0},
        {"op": "reconstruct", "target": {"sae": "main"}, "steps": [0, None]},
    ]  # fmt: skip
    whole = document(tree, *parts, draw=GUIDED, prompts=["", PROMPT], seeds=[0, 42], note="n")
    first = recipe_from(whole, folder=tmp_path)
    write_recipe(first, tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json") == first
    written = json.loads((tmp_path / "r.json").read_text())
    assert to_json(first) == written and written["schema"] == 2
    assert "special_tokens" not in written and first.draw == GUIDED


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"positions": "generated"}, "chooses tokens of a text and the recipe draws images"),
        ({"positions": {"range": [0, 2]}}, "chooses tokens of a text"),
        ({"positions": {"text": "red"}}, "chooses tokens of a text"),
        ({"positions": {"mask": [True, False]}}, "chooses tokens of a text"),
        ({"positions": {"mask": [[0.5], [0.5, 1]]}}, "rows of one length of weights from 0 to 1"),
        ({"positions": {"mask": [[1.5]]}}, "weights from 0 to 1"),
        ({"positions": {"mask": [[float("nan")]]}}, "weights from 0 to 1"),
        ({"steps": [2, 3]}, "is at the steps [2, 3] and the recipe draws in 2, counted from 0"),
        ({"steps": [0, 3]}, "is at the steps [0, 3]"),
        ({"rows": "both"}, "asks for both rows and guidance is 0, so there is no unconditional"),
        ({"rows": "opposed"}, "asks for opposed rows and guidance is 0"),
        ({"site": "resid_post.1"}, "is at resid_post.1 and the recipe draws images"),
        ({"site": "module:vae.decoder.conv_in"}, "wanted a block such as down.2.1, or module:unet"),
        ({"op": "mean_ablate", "strength": None}, "images have not"),
        ({"site": "head_out.1", "op": "zero", "strength": None, "target": {"head": 1}}, "images"),
    ],
)
def test_a_wrong_edit_of_images_is_refused_in_a_sentence(tree, change, sentence):
    edit = {"op": "add", "strength": 1.0} | feature(3) | change
    with pytest.raises(UserError) as told:
        recipe_from(document(tree, edit))
    assert sentence in str(told.value) and "\n" not in str(told.value)


def test_a_wrong_recipe_of_images_is_refused_in_a_sentence(tree):
    for change, sentence in (
        ({"draw": {"steps": 0}}, "at least 1 step"),
        ({"draw": {"steps": 1.5}}, "steps of draw of the recipe must be a whole number"),
        ({"draw": {"step": 1}}, "has the unknown key 'step'"),
        ({"draw": {"height": 30}}, "multiple of 8"),
        ({"seeds": [1.5]}, "must be a whole number"),
        ({"seeds": 3}, "must be a list"),
        ({"effect": ["x"]}, "of schema 2 (images), has the unknown key 'effect'"),
        ({"schema": 1}, "of schema 1 (texts), has the unknown key 'draw'"),
    ):
        with pytest.raises(UserError) as told:
            recipe_from(document(tree) | change)
        assert sentence in str(told.value) and "\n" not in str(told.value)
    without = {key: value for key, value in document(tree).items() if key != "draw"}
    with pytest.raises(UserError, match="lacks 'draw'"):
        recipe_from(without)
    opposed = {"op": "zero", "target": "site", "rows": "opposed"}
    with pytest.raises(UserError, match="op zero cannot be opposed; wanted one of add, scale"):
        recipe_from(document(tree, opposed, draw=GUIDED))


def test_what_does_not_fit_the_image_model_is_refused(tree, tmp_path):
    for edit, sentence in (
        ({"site": "up.9.0"}, "which has down.1.0, down.1.1"),
        ({"site": "mid.0"}, "was trained at down.2.1 and the edit is at mid.0, another block"),
        ({"site": "down.1.0"}, "has width 16 and down.1.0 has width 8"),
        ({"site": f"{BLOCK}:input", "op": "set"}, "can only be read at down.2.1"),
        (feature(D_SAE), f"has no feature {D_SAE}, only 0 to {D_SAE - 1}"),
        ({"target": {"features": [1, 99], "sae": "main"}, "op": "scale"}, "has no feature 99"),
        ({"target": {"neuron": WIDTH}}, f"has no neuron {WIDTH}, only 0 to {WIDTH - 1}"),
        ({"target": {"neuron": 1}, "strength": {"value": 1, "unit": "sd"}}, "give the strength in"),
        ({"strength": {"value": 1, "unit": "max"}}, "has no feature index"),
        ({"positions": {"mask": [[1, 0]]}}, "is 1 by 2 and the feature map of down.2.1 is 4 by 4"),
        ({"positions": {"mask": [[0] * 4] * 4}}, "is 0 everywhere"),
        ({"positions": {"canvas": [[1, 0]]}}, "the canvas is 1 by 2"),
    ):
        whole = document(tree, {"op": "add", "strength": 1.0} | feature(3) | edit)
        with pytest.raises(UserError) as told:
            prepare(recipe_from(whole), root=tree.root, model=tree.model)
        assert sentence in str(told.value) and "\n" not in str(told.value), edit
    with pytest.raises(UserError, match=r"1001 steps were asked for and the schedule of"):
        ready(tree, draw=DrawConfig(steps=1001)).draw([PROMPT], [SEED])
    own = recipe_from(document(tree))
    other = replace(own, model=replace(own.model, spec="toy-turbo"))
    with pytest.raises(UserError, match=r"is for the model toy-turbo, not for"):
        prepare(other, root=tree.root, model=tree.model)
    narrow = make_sae(tmp_path, tree.spec, BLOCK, 3, width=8)
    with pytest.raises(UserError, match=r"has width 8 and down\.2\.1 has width 16"):
        prepare(
            feature_recipe(narrow, 1, strength=Strength(value=1.0), draw=STEPS), root=tmp_path,
            model=tree.model,
        )  # fmt: skip
    with pytest.raises(UserError, match="1 prompts and 2 seeds"):
        ready(tree).draw([PROMPT], [1, 2])


def test_texts_and_images_are_not_mixed_up(tree):
    with pytest.raises(UserError, match="draws images and a recipe of texts was wanted"):
        steering.prepare(recipe_from(document(tree)), root=tree.root)
    text = feature_recipe(replace_site(tree), 3, strength=Strength(value=1.0))
    with pytest.raises(UserError, match="is of texts and one of images was wanted"):
        prepare(text, root=tree.root, model=tree.model)
    with pytest.raises(UserError, match="a block of an image model"):
        feature_recipe(tree.saes[BLOCK], 3, strength=Strength(value=1.0))


def replace_site(tree: ImageTree):
    """The SAE's run as if it were of a language model."""
    from probe.runs import Run

    run = tree.saes[BLOCK]
    return Run(run.path, run.config | {"site": "resid_post.1"})


def test_a_drawing_that_fails_leaves_no_hook_behind(tree, monkeypatch):
    drawing = ready(tree, {"op": "set", "strength": 3.0} | feature(5))
    unedited = plain(tree)
    with pytest.raises(UserError, match="at least one prompt"):
        drawing.draw([], [])
    blown_up = ready(tree, {"op": "add", "strength": 1e38} | feature(5))
    with pytest.raises(Failure, match="NaN or infinite latents; try smaller strengths"):
        blown_up.draw([PROMPT], [SEED])

    def fail(*_):
        raise RuntimeError("no codes")

    monkeypatch.setattr(type(drawing.saes["main"].sae), "encode", fail)
    with pytest.raises(RuntimeError, match="no codes"):
        drawing.compare([PROMPT], [SEED])
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in tree.model.unet.modules()
    )
    assert hooks == 0 and tree.model.drawing is None
    assert torch.equal(plain(tree), unedited)
