"""Recipes: read strictly, written back the same, and doing to a model what they say."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact_tree import D_SAE, SITE, Tree

from app.cli import dispatch
from probe.capture import capturing
from probe.directions import Direction, save_direction
from probe.errors import UserError
from probe.generation import GenerateConfig, generate, prompt_tokens
from probe.interventions import Channels, Where, applying
from probe.models import load_language_model
from probe.sites import parse_site
from saes.feature_queries import FeatureIndex
from saes.recipe_making import feature_recipe
from saes.recipe_saes import find_sae, sae_reference
from saes.recipes import (
    Feature,
    ModelReference,
    Positions,
    Recipe,
    RecipeEdit,
    Statistics,
    Strength,
    WholeSite,
    read_recipe,
    recipe_from,
    to_json,
    write_recipe,
)
from saes.steering import prepare, reference_values

PROMPT = "Rain fell on the harbour"
PLACE = parse_site(SITE)


@pytest.fixture(scope="module")
def model(browsed: Tree):
    return load_language_model(browsed.sae.config["model"]["spec"], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def feature(browsed: Tree) -> int:
    """The feature that fires most often."""
    return int(opened(browsed).numbers().sort_values("density")["feature"].iloc[-1])


def opened(tree: Tree) -> FeatureIndex:
    return FeatureIndex.open(next(tree.sae.path.glob("index-*")))


def document(tree: Tree, **edit) -> dict:
    """A recipe as JSON, with one edit changed."""
    whole = to_json(feature_recipe(tree.sae, 3, strength=Strength(value=1.0)))
    whole["edits"][0] |= edit
    whole["edits"][0] = {k: v for k, v in whole["edits"][0].items() if v != "absent"}
    return whole


def recipe(tree: Tree, **edit) -> Recipe:
    return recipe_from(document(tree, **edit))


# ---------------------------------------------------------------------------------------- the file


def test_every_part_is_written_and_read_back(browsed, tmp_path):
    parts = [
        {"op": "add", "strength": {"value": 1.5, "unit": "sd"}},
        {"op": "set", "positions": "last", "steps": [0, 1]},
        {"op": "scale", "positions": {"range": [1, None]}, "steps": [0, None]},
        {"op": "clamp", "positions": {"range": [-3, -1]}, "target": {"neuron": 2}},
        {"op": "zero", "strength": "absent", "positions": {"text": "sea"}, "target": "site"},
        {"op": "mean_ablate", "strength": "absent", "positions": {"mask": [True, False]}},
        {"op": "patch", "strength": "absent", "source": "The sea", "positions": "prompt"},
        {"op": "project_out", "strength": "absent", "target": {"direction": "d.safetensors"}},
        {
            "op": "scale",
            "site": "head_out.1",
            "target": {"head": 1},
            "positions": {"mask": [True, False]},
        },
        {"op": "transport", "source": "The sea", "target": {"features": [3, 1], "sae": "main"}},
        {"op": "zero", "strength": "absent", "target": {"neurons": [4, 2]}},
        {"op": "reconstruct", "strength": "absent", "target": {"sae": "main"}},
    ]
    whole = document(browsed)
    whole["edits"] = [document(browsed, **part)["edits"][0] for part in parts]
    whole |= {"prompts": ["One", "two"], "effect": [" sea"], "special_tokens": True, "note": "n"}
    first = recipe_from(whole, folder=tmp_path)
    write_recipe(first, tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json") == first
    assert to_json(first) == json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"op": "boost"}, "edit 1 of the recipe has op 'boost'; wanted one of add, set"),
        ({"colour": 1}, "edit 1 of the recipe has the unknown key 'colour'"),
        ({"site": "absent"}, "edit 1 of the recipe lacks 'site'"),
        ({"site": "resid.1"}, "site 'resid.1' is not known"),
        ({"strength": "absent"}, "op add needs a strength"),
        ({"op": "zero"}, "op zero takes no strength"),
        ({"strength": {"value": float("nan")}}, "must be a finite number; got nan"),
        ({"strength": {"value": float("inf")}}, "must be a finite number; got inf"),
        ({"strength": {"value": "2"}}, "must be a finite number; got '2'"),
        ({"strength": {"value": 2, "unit": "sigma"}}, "unit 'sigma'; wanted one of raw, mean"),
        ({"op": "scale", "strength": {"value": 2, "unit": "max"}}, "no unit but raw"),
        ({"target": {"feature": -1, "sae": "main"}}, "must be 0 or more; got -1"),
        ({"target": {"feature": 1, "sae": "x"}}, "uses the SAE 'x', and saes has main"),
        ({"target": {"latent": 1}}, "the target of edit 1 of the recipe must be"),
        ({"target": "site"}, "wants to add a whole site"),
        ({"target": {"head": 1}}, "wants to add a whole head"),
        ({"op": "zero", "strength": "absent", "target": {"head": 1}}, "at head_out sites"),
        ({"positions": "first"}, "positions of edit 1 of the recipe must be one of"),
        ({"positions": {"range": [3, 3]}}, "must name one or more"),
        ({"positions": {"range": [3]}}, "must be [first, end]"),
        ({"positions": {"mask": []}}, "must be a list of true and false"),
        ({"positions": {"mask": [1, 0]}}, "must be a list of true and false"),
        (
            {"positions": {"mask": [[True], [True, False]]}},
            "rows of one length of weights from",
        ),
        ({"steps": [-1, 2]}, "counted from 0"),
        ({"op": "patch", "strength": "absent"}, "op patch needs a source prompt"),
        ({"source": "x"}, "op add takes no source"),
        ({"op": "transport"}, "op transport needs a source prompt"),
        ({"op": "reconstruct", "strength": "absent"}, "belong together"),
        ({"target": {"sae": "main"}}, "belong together"),
        ({"target": {"features": [1, 1], "sae": "main"}}, "must name each once"),
        ({"target": {"features": [], "sae": "main"}}, "one whole number or more"),
        ({"target": {"features": [1, 2], "sae": "main"}}, "wants to add a whole set of features"),
        ({"positions": {"mask": [[True, False]]}}, "the mask is of an image, 1 by 2"),
        ({"positions": {"canvas": [[0.5]]}}, "the mask is of an image"),
        ({"rows": "both"}, "rows of guidance, which only images have"),
        ({"rows": "none"}, "must be one of conditional, both, opposed"),
        ({"site": "mid.0"}, "a block of an image model"),
        (
            {"op": "project_out", "strength": "absent", "target": {"neuron": 1}},
            "op zero does that",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_sentence(browsed, change, sentence):
    with pytest.raises(UserError) as told:
        recipe(browsed, **change)
    assert sentence in str(told.value) and "\n" not in str(told.value)


def test_a_wrong_file_is_refused_in_a_sentence(browsed, tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(UserError, match="there is no recipe"):
        read_recipe(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_recipe(path)
    for change, sentence in (
        ({"schema": 3}, "has schema 3 and this version reads 1 (of texts) and 2 (of images)"),
        ({"draw": {}}, "of schema 1 (texts), has the unknown key 'draw'"),
        ({"schema": 2}, "of schema 2 (images), has the unknown key 'effect'"),
        ({"edits": []}, "must be a list of one edit or more"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"model": "smollm2"}, "must be a JSON object; got str"),
        ({"prompts": "one"}, "must be a list of texts"),
        ({"special_tokens": 1}, "must be true or false"),
    ):
        path.write_text(json.dumps(document(browsed) | change))
        with pytest.raises(UserError) as told:
            read_recipe(path)
        assert sentence in str(told.value)
    path.write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object; got list"):
        read_recipe(path)


# ----------------------------------------------------------------------------------- what it needs


def test_the_sae_is_known_by_its_weights(browsed, tmp_path):
    reference = sae_reference(browsed.sae)
    renamed = replace(reference, name="other-name")
    assert find_sae(renamed, browsed.root).run.path == browsed.sae.path
    with pytest.raises(UserError, match="has other weights"):
        find_sae(replace(reference, weights="0" * 64), browsed.root)
    with pytest.raises(UserError, match="there is none with these weights below"):
        find_sae(reference, tmp_path)


def test_what_does_not_fit_the_model_is_refused(browsed, model, llama, tmp_path):
    for edit, sentence in (
        ({"target": {"feature": D_SAE, "sae": "main"}}, f"no feature {D_SAE}, only 0 to 63"),
        ({"site": "mlp_act.1"}, "has width 32 and mlp_act.1 has width 96"),
        ({"site": "resid_post.7"}, "whose layers are 0 to 1"),
        ({"site": "resid_post.0", "op": "set"}, "can only be read at resid_post.1"),
        ({"target": {"neuron": 32}}, "has no neuron 32, only 0 to 31"),
        (
            {"op": "zero", "strength": "absent", "site": "head_out.0", "target": {"head": 4}},
            "has no head 4, only 0 to 3",
        ),
    ):
        with pytest.raises(UserError) as told:
            prepare(recipe(browsed, **edit), root=browsed.root, model=model)
        assert sentence in str(told.value)
    with pytest.raises(UserError, match=r"is for the model .*, not for tiny-llama"):
        prepare(recipe(browsed), root=browsed.root, model=llama)
    twin = replace(recipe(browsed), model=ModelReference(spec=model.spec, random_weights=1))
    with pytest.raises(UserError, match="with random weights"):
        prepare(twin, root=browsed.root, model=model)


def test_positions_that_do_not_fit_the_prompt_are_refused(browsed, model):
    tokens = prompt_tokens(model, PROMPT)
    for positions, sentence in (
        ({"mask": [True]}, f"the mask has 1 values and the prompt {len(tokens)} tokens"),
        ({"range": [40, 50]}, "is not in the prompt"),
        ({"text": "whale"}, "the text 'whale' is not in the prompt"),
        ({"range": [0, 1]}, "chooses no token of the prompt"),
    ):
        ready = prepare(recipe(browsed, positions=positions), root=browsed.root, model=model)
        with pytest.raises(UserError) as told:
            ready.edits(tokens)
        assert sentence in str(told.value)
    patch = {"op": "patch", "strength": "absent", "source": "Sea"}
    ready = prepare(recipe(browsed, **patch), root=browsed.root, model=model)
    with pytest.raises(UserError, match="must choose as many in both"):
        ready.edits(tokens)


# ------------------------------------------------------------------------------------ what it does


def activations(model, tokens, edits=()) -> torch.Tensor:
    with torch.no_grad(), applying(model, edits), capturing(model, [PLACE]) as seen:
        model.run(tokens[None])
        return seen[PLACE][0]


def test_a_feature_is_pushed_along_its_decoder_and_the_rest_is_kept(browsed, model, feature):
    tokens = prompt_tokens(model, PROMPT)
    x = activations(model, tokens)
    sae = find_sae(sae_reference(browsed.sae), browsed.root).sae
    codes = sae.encode(x)
    a = (codes.values * (codes.indices == feature)).sum(-1)
    assert (a[1:] > 0).any(), "a feature that fires, so that there is something to change"
    row = opened(browsed).feature(feature)
    on = {"feature": feature, "sae": "main"}
    for edit, new in (
        ({"op": "add", "strength": 2.5}, a + 2.5),
        ({"op": "add", "strength": {"value": 2, "unit": "max"}}, a + 2 * row["max"]),
        ({"op": "set", "strength": {"value": 1, "unit": "mean"}}, a * 0 + row["mean"]),
        ({"op": "set", "strength": {"value": 3, "unit": "sd"}}, a * 0 + 3 * row["sd"]),
        ({"op": "scale", "strength": 4.0}, 4 * a),
        ({"op": "clamp", "strength": 0.1}, a.clamp(max=0.1)),
        ({"op": "zero", "strength": "absent"}, 0 * a),
    ):
        ready = prepare(recipe(browsed, **edit, target=on), root=browsed.root, model=model)
        got = activations(model, tokens, ready.edits(tokens)) - x
        expected = (new - a)[:, None] * sae.W_dec[feature]
        expected[0] = 0  # position 0 is left alone
        assert torch.allclose(got, expected, atol=2e-5), edit


def test_special_tokens_are_left_alone_unless_asked_for(browsed, model):
    tokens = torch.cat([prompt_tokens(model, "ab"), prompt_tokens(model, "c")])
    edited = {}
    for special in (False, True):
        one = replace(recipe(browsed), special_tokens=special)
        (edit,) = prepare(one, root=browsed.root, model=model).edits(tokens)
        assert isinstance(edit.where, Where)
        edited[special] = edit.where.prompt.tolist()
    assert edited == {False: [False, True, True, False, True], True: [True] * 5}


def test_statistics_in_the_recipe_come_before_the_index(browsed, model):
    statistics = Statistics(mean=1.0, max=7.0, sd=2.0)
    one = feature_recipe(
        browsed.sae, 3, strength=Strength(value=3.0, unit="max"), statistics=statistics
    )
    (prepared,) = prepare(one, root=browsed.root, model=model).prepared
    assert prepared.value.tolist() == [21.0]


def test_times_multiplies_what_a_recipe_does(browsed, model):
    tokens = prompt_tokens(model, PROMPT)
    for edit, value in (({"strength": 3.0}, 1.5), ({"op": "scale", "strength": 3.0}, 2.0)):
        ready = prepare(recipe(browsed, **edit), root=browsed.root, model=model)
        assert ready.edits(tokens, times=0.5)[0].value.tolist() == [value]
        plain, none = ready.next_token(tokens, ()), ready.edits(tokens, times=0.0)
        assert torch.allclose(ready.next_token(tokens, none), plain, atol=1e-5)


def test_a_whole_site_patched_from_another_prompt_is_that_prompt(browsed, model):
    source = "Snow fell on the mountain"[: len(PROMPT)].ljust(len(PROMPT), ".")
    whole = Recipe(
        name="patch",
        model=ModelReference(spec=model.spec),
        edits=(RecipeEdit(site=SITE, op="patch", target=WholeSite(), source=source),),
        special_tokens=True,
    )
    ready = prepare(whole, root=browsed.root, model=model)
    tokens = prompt_tokens(model, PROMPT)
    patched = ready.next_token(tokens, ready.edits(tokens))
    assert torch.allclose(patched, ready.next_token(prompt_tokens(model, source), ()), atol=1e-5)


def test_patched_positions_pair_up_in_order(browsed, model):
    """The last token here gets what the last token of a longer text has."""
    one = RecipeEdit(
        site=SITE, op="patch", target=WholeSite(), source=PROMPT + " again",
        positions=Positions(named="last"),
    )  # fmt: skip
    whole = Recipe(name="p", model=ModelReference(spec=model.spec), edits=(one,))
    ready = prepare(whole, root=browsed.root, model=model)
    tokens, source = prompt_tokens(model, PROMPT), prompt_tokens(model, PROMPT + " again")
    got = activations(model, tokens, ready.edits(tokens))
    assert torch.allclose(got[-1], activations(model, source)[-1], atol=1e-5)
    assert torch.equal(got[:-1], activations(model, tokens)[:-1])


def test_heads_neurons_and_directions(browsed, model, tmp_path):
    tokens = prompt_tokens(model, PROMPT)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    found = Direction(vector=vector, site=PLACE, model=model.spec, mean=1.0, sd=2.0, max=4.0)
    save_direction(tmp_path / "d.safetensors", found)
    along = {"direction": "d.safetensors"}
    unit = vector / vector.norm()
    x = activations(model, tokens)
    whole = document(browsed, op="add", target=along, strength={"value": 2, "unit": "max"})
    added = prepare(recipe_from(whole, folder=tmp_path), root=browsed.root, model=model)
    got = activations(model, tokens, added.edits(tokens)) - x
    assert torch.allclose(got[1:], (8 * unit).expand_as(got[1:]), atol=1e-5)
    whole = document(browsed, op="project_out", target=along, strength="absent")
    out = prepare(recipe_from(whole, folder=tmp_path), root=browsed.root, model=model)
    assert torch.allclose(
        activations(model, tokens, out.edits(tokens))[1:] @ unit, torch.zeros(len(x) - 1), atol=1e-5
    )
    narrow = replace(found, vector=vector[:8])
    save_direction(tmp_path / "d.safetensors", narrow)
    with pytest.raises(UserError, match=r"has width 8 and resid_post\.1 has width 32"):
        prepare(recipe_from(whole, folder=tmp_path), root=browsed.root, model=model)

    neuron = recipe(browsed, op="mean_ablate", strength="absent", target={"neuron": 5})
    ready = prepare(neuron, root=browsed.root, model=model)
    (prepared,) = ready.prepared
    mean = reference_values(model, PLACE, prepared.component).mean()
    got = activations(model, tokens, ready.edits(tokens))
    assert torch.allclose(got[1:, 5], mean.expand(len(x) - 1), atol=1e-5)
    assert torch.equal(got[:, :5], x[:, :5])

    head = recipe(browsed, op="zero", strength="absent", site="head_out.1", target={"head": 2})
    (edit,) = prepare(head, root=browsed.root, model=model).edits(tokens)
    assert edit.component == Channels(start=16, stop=24)


def test_steering_is_the_same_with_and_without_a_cache(browsed, model, feature):
    tokens = prompt_tokens(model, PROMPT)
    on = {"feature": feature, "sae": "main"}
    for edit in (
        {"op": "set", "strength": 9.0},
        {"op": "scale", "strength": 9.0, "positions": "generated"},
        {"op": "add", "strength": 9.0, "steps": [2, 4]},
    ):
        ready = prepare(recipe(browsed, **edit, target=on), root=browsed.root, model=model)
        texts = [
            generate(
                model, tokens, edits=ready.edits(tokens),
                config=GenerateConfig(max_new_tokens=10, cache=cache),
            ).tokens.tolist()
            for cache in (True, False)
        ]  # fmt: skip
        assert texts[0] == texts[1], edit


def test_both_texts_and_what_changed_are_compared(browsed, model):
    ready = prepare(recipe(browsed, strength=40.0), root=browsed.root, model=model)
    compared = ready.compare(PROMPT, GenerateConfig(max_new_tokens=5), top=3)
    tokens = prompt_tokens(model, PROMPT)
    before, after = ready.next_token(tokens, ()), ready.next_token(tokens, ready.edits(tokens))
    assert compared.kl == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-5)
    assert compared.kl > 0.01
    assert len(compared.next_token) == 3
    assert compared.next_token["steered"].is_monotonic_decreasing
    with pytest.raises(UserError, match="the prompt is empty"):
        ready.compare(" ")
    with pytest.raises(UserError, match="reads at most 256"):
        ready.compare("a" * 250)


def test_recipes_in_the_project_are_valid():
    files = sorted((Path(__file__).parent.parent / "artifacts" / "recipes").rglob("*.json"))
    assert files
    for path in files:
        one = read_recipe(path)
        assert one.prompts and one.note and copy.deepcopy(to_json(one))
        assert all(isinstance(e.target, Feature) and e.target.statistics for e in one.edits)


def test_steer_runs_recipes_side_by_side(browsed, tmp_path, capsys):
    path, out = tmp_path / "five.json", tmp_path / "out.json"
    recipe = feature_recipe(browsed.sae, 5, strength=Strength(value=20.0), name="five")
    write_recipe(recipe, path)
    asked = ["steer", str(path), "--prompt", "Rain fell", "--max-new-tokens", "4"]
    where = ["--root", str(browsed.root), "--device", "cpu", "--out", str(out)]
    assert dispatch([*asked, *where]) == 0
    shown = capsys.readouterr().out
    assert "five: Rain fell" in shown and shown.splitlines()[-1] == str(out)
    (row,) = json.loads(out.read_text())
    assert row["kl"] > 0 and {"default", "steered", "next_token"} <= set(row)
    assert dispatch(["steer", str(path), *where]) == 2
    assert "no prompts of its own" in capsys.readouterr().err
    assert dispatch(["steer", str(path), "--prompt", "x", "--dry-run"]) == 0
    assert "add feature 5 of main at resid_post.1" in capsys.readouterr().err
    assert dispatch(["steer", "--root", str(browsed.root)]) == 2
