"""Feature transport and its baselines against the published procedure, written out with loops."""

from dataclasses import replace

import pytest
import torch
from image_tree import BLOCKS, D_SAE, ImageTree, K, loaded_sae, make_image_tree
from torch import Tensor

from probe.diffusion import DrawConfig
from probe.errors import UserError
from probe.interventions import applying
from probe.sites import parse_site
from saes.drawing import prepare
from saes.recipe_saes import LoadedSae
from saes.recipes import Features, read_recipe, write_recipe
from saes.transport import (
    Chosen,
    Pair,
    choose,
    feature_scores,
    neuron_recipe,
    neuron_sites,
    recipe_of_features,
    steering_recipe,
    transport_recipe,
)

DRAW = DrawConfig(steps=2)
SITES = tuple(map(parse_site, BLOCKS))
SOURCE_MASK = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0.0]])
TARGET_MASK = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0.0]])
IN_SOURCE, IN_TARGET = (mask.flatten().bool() for mask in (SOURCE_MASK, TARGET_MASK))
PAIR = Pair(
    source="two blue boats", target="a red circle", seed=3, draw=DRAW,
    source_mask=SOURCE_MASK, target_mask=TARGET_MASK,
)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> ImageTree:
    return make_image_tree(tmp_path_factory.mktemp("transport"))


@pytest.fixture(scope="module")
def saes(tree) -> dict[str, LoadedSae]:
    return {block: loaded_sae(run) for block, run in tree.saes.items()}


def encode(one: LoadedSae, x: Tensor) -> Tensor:
    w = one.sae
    pre = (x - w.b_dec) @ w.W_enc + w.b_enc
    kept = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())


def outputs(tree: ImageTree, prompt: str, paths: list[str]) -> dict[str, Tensor]:
    """What modules give, [s, t, d]; of attention blocks what they add to their input."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def keep(_, args, out, path=path) -> None:
            if isinstance(out, tuple):
                out = (out[0] - args[0]).flatten(2).transpose(1, 2)
            seen[path].append(out[0])

        module = tree.model.unet.get_submodule(path)
        handles.append(module.register_forward_hook(keep))
    tree.model.generate([prompt], [PAIR.seed], DRAW)
    for handle in handles:
        handle.remove()
    return {path: torch.stack(values) for path, values in seen.items()}


BLOCK_PATHS = ["down_blocks.2.attentions.1", "up_blocks.0.attentions.0"]


def with_hooks(tree: ImageTree, hooks: dict) -> Tensor:
    """Latents of the target with `hook(step, args, output)` at modules of the U-Net."""
    handles = []
    for path, hook in hooks.items():
        passes = iter(range(DRAW.steps))

        def run(_, args, output, hook=hook, passes=passes):
            return hook(next(passes), args, output)

        module = tree.model.unet.get_submodule(path)
        handles.append(module.register_forward_hook(run))
    drawn = tree.model.generate([PAIR.target], [PAIR.seed], DRAW)
    for handle in handles:
        handle.remove()
    return drawn.latents


def by_recipe(tree: ImageTree, recipe, tmp_path) -> Tensor:
    """The latents of a recipe that went through its file, with SAEs found by their weights."""
    write_recipe(recipe, tmp_path / "r.json")
    read = read_recipe(tmp_path / "r.json")
    drawing = prepare(read, root=tree.root, model=tree.model)
    with applying(tree.model, drawing.edits(read.seeds)):
        return tree.model.generate(read.prompts, read.seeds, drawing.config).latents


def assert_same(found: Tensor, wanted: Tensor, tree: ImageTree) -> None:
    effect = (wanted - with_hooks(tree, {})).abs().max()
    assert effect > 1e-2, "the transport changes something"
    assert (found - wanted).abs().max() <= min(5e-4, 0.02 * effect)


def published_scores(source: Tensor, target: Tensor, aggregate: str) -> Tensor:
    """`best_features_saeuron` of the authors: [steps, places in the mask, features]."""
    first = aggregate == "first"
    source, target = (x[0] if first else x.mean(0) for x in (source, target))
    source, target = source.mean(0), target.mean(0)
    return source / source.sum() - target / target.sum()


# ------------------------------------------------------------------------------------ features


@pytest.mark.parametrize(
    ("aggregate", "removal", "balanced"),
    [("first", "running", False), ("mean", "clean", False), ("mean", "running", True)],
)
def test_features_are_transported_as_published(tree, saes, tmp_path, aggregate, removal, balanced):
    k, m = 6, 2.0
    recipe = transport_recipe(
        tree.model, saes, PAIR, k=k, m=m, aggregate=aggregate, removal=removal, balanced=balanced
    )
    gives, has = (outputs(tree, prompt, BLOCK_PATHS) for prompt in (PAIR.source, PAIR.target))
    codes = {
        block: (encode(saes[block], gives[path]), encode(saes[block], has[path]))
        for block, path in zip(BLOCKS, BLOCK_PATHS, strict=True)
    }
    scores = published_scores(
        torch.cat([source[:, IN_SOURCE] for source, _ in codes.values()], -1),
        torch.cat([target[:, IN_TARGET] for _, target in codes.values()], -1),
        aggregate,
    )
    order = scores.argsort(descending=True)
    hooks = {}
    for i, (block, path) in enumerate(zip(BLOCKS, BLOCK_PATHS, strict=True)):
        W = saes[block].sae.W_dec
        added, removed = (
            [int(n) - i * D_SAE for n in some if i * D_SAE <= n < (i + 1) * D_SAE]
            for some in (order[:k], order[-k:])
        )
        source, target = codes[block]
        ratio = len(added) / max(len(removed), 1) if balanced else 1.0  # rows of W are of norm 1

        def hook(
            step, args, output, block=block, W=W, source=source, target=target, added=added,
            removed=removed, ratio=ratio,
        ):  # fmt: skip
            update = (output[0] - args[0]).flatten(2).transpose(1, 2)[0]
            mine = target[step] if removal == "clean" else encode(saes[block], update)
            new = update.clone()
            for place in range(16):
                for n in added if IN_SOURCE[place] else []:
                    new[place] += m * source[step, place, n] * W[n]
                for n in removed if IN_TARGET[place] else []:
                    new[place] -= ratio * m * mine[place, n] * W[n]
            shape = output[0].shape
            return (args[0] + new.T.reshape(shape), *output[1:])

        hooks[path] = hook
    assert_same(by_recipe(tree, recipe, tmp_path), with_hooks(tree, hooks), tree)


def test_a_recipe_of_transport_stands_alone(tree, saes):
    recipe = transport_recipe(tree.model, saes, PAIR, k=6)
    assert recipe.prompts == (PAIR.target,) and recipe.seeds == (3,) and recipe.draw == DRAW
    assert {edit.op for edit in recipe.edits} == {"transport", "scale"}
    assert all(isinstance(edit.target, Features) for edit in recipe.edits)
    named = {edit.op: 0 for edit in recipe.edits}
    for edit in recipe.edits:
        assert isinstance(edit.target, Features)
        named[edit.op] += len(edit.target.features)
    assert named == {"transport": 6, "scale": 6}
    only = transport_recipe(tree.model, saes, PAIR, k=6, only_add=True)
    assert {edit.op for edit in only.edits} == {"transport"}
    everywhere = Pair(source=PAIR.source, target=PAIR.target, draw=DRAW)
    whole = transport_recipe(tree.model, saes, everywhere, k=2)
    assert all(edit.positions.named == "all" for edit in whole.edits)


def test_scores_by_hand():
    """Two sites of 2 and 3 features, two steps, two places of which the mask takes one."""
    one, two = SITES
    weights = torch.tensor([1.0, 0.0])

    def numbers(*first: float) -> dict:
        values = torch.tensor([[first, [9.0] * 5], [[0, 0, 0, 0, 4.0], [9.0] * 5]])
        return {one: (values[..., :2], weights), two: (values[..., 2:], weights)}

    # Shares 1/8, 3/8, 4/8, 0, 0 of the source and 0, 2/4, 0, 2/4, 0 of the target.
    source, target = numbers(1, 3, 4, 0, 0), numbers(0, 2, 0, 2, 0)
    chosen = choose(source, target, k=2, aggregate="first")
    assert chosen.added == {one: (0,), two: (0,)} and chosen.removed == {one: (1,), two: (1,)}
    # Over both steps: (1, 3, 4, 0, 4) / 12 and (0, 2, 0, 2, 4) / 8.
    chosen = choose(source, target, k=2, aggregate="mean")
    assert chosen.added == {one: (0,), two: (0,)}
    assert chosen.removed == {one: (), two: (1, 2)}


def test_the_list_of_scores_is_what_is_chosen_by(tree, saes):
    scores = feature_scores(tree.model, saes, PAIR, aggregate="mean")
    assert len(scores) == 2 * D_SAE and set(scores["site"]) == set(BLOCKS)
    assert [scores[side].to_numpy().sum() for side in ("source", "target")] == pytest.approx([1, 1])
    assert (scores["source"] - scores["target"]).tolist() == pytest.approx(scores["score"].tolist())

    def by_site(rows) -> dict:
        return {
            site: tuple(int(one) for one in rows["feature"][rows["site"] == str(site)])
            for site in SITES
        }

    by_k = transport_recipe(tree.model, saes, PAIR, k=6, aggregate="mean")
    chosen = Chosen(added=by_site(scores.head(6)), removed=by_site(scores[::-1].head(6)))
    by_hand = recipe_of_features(tree.model, saes, PAIR, chosen, what="features, k 6, m 1")
    assert by_hand == by_k
    fewer = replace(chosen, removed={})
    assert recipe_of_features(tree.model, saes, PAIR, fewer).edits == tuple(
        edit for edit in by_k.edits if edit.op == "transport"
    )
    with pytest.raises(UserError, match="there is nothing to transport; choose a feature"):
        recipe_of_features(tree.model, saes, PAIR, Chosen(added={}, removed={}))
    twice = {"one": saes[BLOCKS[0]], "two": saes[BLOCKS[0]]}
    with pytest.raises(UserError, match=r"one SAE of each block was wanted, got .*down\.2\.1"):
        feature_scores(tree.model, twice, PAIR)


def test_what_cannot_be_transported_is_refused(tree, saes):
    for pair, sentence in (
        (replace(PAIR, source_mask=torch.zeros(4, 4)), "the mask of the transport is 0 everywhere"),
        (replace(PAIR, target_mask=torch.ones(2, 3)), "the canvas is 2 by 3 and the feature map"),
    ):
        with pytest.raises(UserError, match=sentence):
            transport_recipe(tree.model, saes, pair, k=3)
    for k in (0, D_SAE + 1):
        with pytest.raises(UserError, match=f"k must be from 1 to {D_SAE}, half of the 96"):
            transport_recipe(tree.model, saes, PAIR, k=k)
    silent = {SITES[0]: (torch.zeros(1, 2, 4), torch.ones(2))}
    with pytest.raises(UserError, match="nothing fires at the places of the mask"):
        choose(silent, silent, k=1, aggregate="first")
    with pytest.raises(UserError, match=r"which has down\.1\.0"):
        steering_recipe(tree.model, [parse_site("up.9.0")], PAIR)


# ----------------------------------------------------------------------------------- baselines


def test_whole_updates_are_transported_as_published(tree, tmp_path):
    m = 0.5
    gives, has = (outputs(tree, prompt, BLOCK_PATHS) for prompt in (PAIR.source, PAIR.target))
    hooks = {}
    for path in BLOCK_PATHS:

        def hook(step, args, output, path=path):
            delta = torch.zeros(16, 16)
            delta[IN_SOURCE] += m * gives[path][step][IN_SOURCE]
            delta[IN_TARGET] -= m * has[path][step][IN_TARGET]
            return (output[0] + delta.T.reshape(output[0].shape), *output[1:])

        hooks[path] = hook
    recipe = steering_recipe(tree.model, SITES, PAIR, m=m)
    assert_same(by_recipe(tree, recipe, tmp_path), with_hooks(tree, hooks), tree)
    assert len(steering_recipe(tree.model, SITES, PAIR, only_add=True).edits) == 2


@pytest.mark.parametrize("aggregate", ["first", "mean"])
def test_neurons_are_transported_as_published(tree, tmp_path, aggregate):
    k, m = 20, 2.0
    sites = [site for block in SITES for site in neuron_sites(tree.model, block)]
    paths = [f"{path}.transformer_blocks.{n}.ff.net.0" for path in BLOCK_PATHS for n in (0, 1)]
    assert [str(site) for site in sites] == [f"module:unet.{path}" for path in paths]
    gives, has = (outputs(tree, prompt, paths) for prompt in (PAIR.source, PAIR.target))

    def normalised(values: Tensor) -> Tensor:
        return values / values.norm(dim=1, keepdim=True)

    scores = published_scores(
        torch.cat([normalised(gives[path][:, IN_SOURCE]) for path in paths], -1),
        torch.cat([normalised(has[path][:, IN_TARGET]) for path in paths], -1),
        aggregate,
    )
    order, width = scores.argsort(descending=True), gives[paths[0]].shape[-1]
    hooks = {}
    for i, path in enumerate(paths):
        added, removed = (
            [int(n) - i * width for n in some if i * width <= n < (i + 1) * width]
            for some in (order[:k], order[-k:])
        )

        def hook(step, args, output, path=path, added=added, removed=removed):
            new = output.clone()
            for place in range(16):
                if IN_SOURCE[place]:
                    new[0, place, added] += m * gives[path][step, place, added]
                if IN_TARGET[place]:
                    new[0, place, removed] -= m * has[path][step, place, removed]
            return new

        hooks[path] = hook
    recipe = neuron_recipe(tree.model, SITES, PAIR, k=k, m=m, aggregate=aggregate)
    assert_same(by_recipe(tree, recipe, tmp_path), with_hooks(tree, hooks), tree)
