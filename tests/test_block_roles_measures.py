"""The block-roles study's measures against hand-made tables and slow references."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from analyses import block_roles_numbers, block_roles_scores
from analyses.block_roles_causes import compared
from analyses.block_roles_drawing import Change, moved
from analyses.block_roles_findings import neighbours, verdicts
from analyses.block_roles_images import BlockCodes, by_quarter, quarter_of
from analyses.block_roles_locality import amounts, controls, shares, split_means, suitable
from analyses.block_roles_measured import CARRYING as CARRYING_SITES
from analyses.block_roles_measured import (
    FACTORS,
    OPENED,
    OUTCOMES,
    PRESETS,
    Config,
    Measured,
    settle,
)
from analyses.block_roles_pairs import make_pairs, outcomes
from analyses.block_roles_probes import (
    PAIR,
    PROBED,
    Samples,
    auroc_draws,
    best_thresholds,
    drawn_images,
    f1_draws,
    fitted_answers,
    join,
    samples,
    value_features,
)
from analyses.block_roles_tables import state_of
from analyses.block_roles_transport import inside, mask_of
from probe.errors import UserError
from probe.toyturbo.briefs import UNSAID
from probe.toyturbo.briefs import settle as settle_scenes
from probe.toyturbo.fitting import seeded
from probe.toyturbo.reader import random_scenes
from probe.toyturbo.unet_training import CARRYING, PHASES
from probe.toyturbo.world import Scenes

FOUR_BY_FOUR = (4, 4)


def _f1(truth, said) -> float:
    """scikit-learn's F1; 0 where nothing is true and nothing said."""
    return float(f1_score(truth, said, zero_division=0))  # pyright: ignore[reportArgumentType]


def codes_of(values, indices, d_sae: int, grid=FOUR_BY_FOUR) -> BlockCodes:
    n = len(values)
    return BlockCodes(
        values=torch.as_tensor(values, dtype=torch.float32),
        indices=torch.as_tensor(indices, dtype=torch.int32),
        updates=torch.zeros(n, 4, 2),
        grid=grid,
        d_sae=d_sae,
    )


def one_feature_codes(maps: torch.Tensor, feature: int = 1, d_sae: int = 3) -> BlockCodes:
    """Codes in which a single feature is active as the maps [n, 4, 4] say."""
    values = maps.flatten(1)[..., None]
    return codes_of(values, torch.where(values > 0, feature, 0), d_sae)


# ---------------------------------------------------------------------------- codes and places


def test_quarters_are_those_of_the_world():
    assert quarter_of(FOUR_BY_FOUR).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    x = torch.arange(16.0)[None, :, None]
    # The means of {0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 12, 13} and {10, 11, 14, 15}.
    assert by_quarter(x, FOUR_BY_FOUR)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_codes_by_quarter_and_image_are_those_of_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 16, 2, generator=generator)
    indices = torch.randint(5, (3, 16, 2), generator=generator)
    indices[..., 1] = (indices[..., 0] + 1) % 5  # an SAE names a feature once a place
    codes = codes_of(values, indices, 5)
    dense = torch.zeros(3, 16, 5).scatter(2, indices, values)
    torch.testing.assert_close(codes.by_quarter(), by_quarter(dense, FOUR_BY_FOUR))
    torch.testing.assert_close(codes.largest(), dense.amax(1))
    torch.testing.assert_close(codes.heat_map(2, torch.tensor([1]))[0].flatten(), dense[1, :, 2])
    mean = torch.stack([dense[..., f][dense[..., f] > 0].mean() for f in range(5)])
    torch.testing.assert_close(codes.means(), mean)
    silent = codes_of(values, torch.where(indices == 3, 2, indices), 6)
    assert silent.means()[[3, 5]].tolist() == [0, 0] and silent.living().tolist() == [0, 1, 2, 4]


# -------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(40, 0)


def test_partners_differ_in_one_factor_and_nothing_else(pairs):
    noise = torch.zeros(40, 4, 32, 32)
    base = settle_scenes(pairs.base, noise)
    assert set(pairs.base.count.tolist()) == {1, 2}
    for factor in FACTORS:
        partner, cells = settle_scenes(pairs.partners[factor], noise), pairs.cells(factor)
        shown = [outcomes(scenes, cells) for scenes in (base, partner)]
        differs = (shown[0] != shown[1]).all(0) | ~(shown[0] != shown[1]).any(0)
        assert differs.all(), f"{factor}: a column differs in all pairs or in none"
        changed = [n for n, c in zip(OUTCOMES, (shown[0] != shown[1]).any(0), strict=True) if c]
        assert changed == [factor]
        prompts = zip(pairs.asked.prompts, pairs.partner(factor).prompts, strict=True)
        assert all(a != b for a, b in prompts)
    assert pairs.partner("shape").seeds == pairs.asked.seeds
    assert not set(pairs.other_noise.seeds) & set(pairs.asked.seeds)


def scene(things: dict[int, tuple[int, int, int, int]], surround=(0, 0)) -> Scenes:
    found = torch.full((1, 4, 4), -1)
    for cell, values in things.items():
        found[0, cell] = torch.tensor(values)
    return Scenes(things=found, surround=torch.tensor([surround]))


def test_outcomes_by_hand():
    disc, other = (0, 3, 1, 2), (2, 7, 0, 1)
    cells = torch.tensor([[0, 3, 1]])  # its own cell, its cell in the partner, the other thing's

    def read(things, where=cells):
        return dict(zip(OUTCOMES, outcomes(scene(things), where)[0].tolist(), strict=True))

    code = ((2 * 8 + 7) * 2 + 0) * 3 + 1
    at_home = {"position": 1, "shape": 0, "colour": 3, "size": 1, "texture": 2, "other thing": code}
    assert at_home.items() <= read({0: disc, 1: other}).items()
    # Gone to the partner's cell: position changes, and its factors are read there.
    assert (at_home | {"position": 8}).items() <= read({3: disc, 1: other}).items()
    # In both cells: position is neither, and the factors are read at home.
    assert (at_home | {"position": 9}).items() <= read({0: disc, 3: other, 1: other}).items()
    nothing = {"position": 0, "shape": -1, "colour": -1, "other thing": -1}
    assert nothing.items() <= read({}).items()
    alone = torch.tensor([[0, 3, UNSAID]])
    assert read({0: disc}, alone)["other thing"] == 0
    assert read({0: disc, 1: other}, alone)["position"] == 3


def test_what_moved_and_what_changed():
    before = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]] * 3)
    source = before.clone()
    source[:2, 2] = 5  # the third pair's images do not differ in colour
    after = before.clone()
    after[0, 2] = 5
    after[1, 2], after[1, 6] = 4, 1
    found = pd.DataFrame(compared(before, after, source, "colour"))
    assert found["moved"].tolist() == [True, False, False]
    assert found["counts"].tolist() == [True, True, False]
    assert found["colour"].tolist() == [True, True, False]
    assert found["light"].tolist() == [False, True, False]


def test_the_split_is_the_one_that_training_makes():
    """What the report says of toy-turbo's training is what its phases do."""
    names = {f"{b.split('.')[0]}.{b.split('.')[1]}" for b in OPENED["position"]}
    assert names == {"down.2", "mid.0"}
    layout, shape, texture, gaps, joint = PHASES
    assert layout.closed == CARRYING[2:] and not layout.detail.shapes
    assert shape.closed == CARRYING[3:] and shape.detail.shapes and not shape.detail.textures
    assert texture.closed == gaps.closed == joint.closed == () and texture.detail.textures
    assert OPENED["shape"] == ("up.0.0",) and OPENED["texture"] == ("up.0.1",)


# --------------------------------------------------------------------------------------- probes


def test_samples_are_cells_things_and_images():
    truth = random_scenes(30, seeded(1))
    for factor in PROBED:
        of = samples(factor, truth)
        for image, label, i in zip(of.image, of.label, range(len(of.image)), strict=True):
            if of.cell is None:
                assert label == truth.factor(factor)[image]
            elif factor == "position":
                assert label == truth.present[image, of.cell[i]]
            elif factor == PAIR:
                colour, shape = (truth.factor(f)[image, of.cell[i]] for f in ("colour", "shape"))
                assert of.names[label] == f"{FACTORS['colour'][colour]} {FACTORS['shape'][shape]}"
            else:
                assert label == truth.factor(factor)[image, of.cell[i]]
    things = int(truth.present.sum())
    sizes = {factor: len(samples(factor, truth).image) for factor in PROBED}
    assert sizes == dict.fromkeys(PROBED, things) | {"position": 120, "background": 30, "light": 30}
    pooled = np.arange(30 * 4 * 2, dtype=np.float32).reshape(30, 4, 2)
    shape = samples("shape", truth)
    assert shape.cell is not None
    assert np.array_equal(shape.of(pooled)[0], pooled[shape.image[0], shape.cell[0]])
    assert np.array_equal(samples("light", truth).of(pooled)[7], pooled[7].mean(0))


def test_best_thresholds_are_those_of_trying_every_cut():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (40, 6)).astype(np.float32)  # ties, and zeros that never count
    truth = rng.random((40, 3)) < 0.3
    truth[:, 2] = False
    for y, best in zip(truth.T, best_thresholds(x, truth), strict=True):
        for feature in range(6):
            tried = [_f1(y, x[:, feature] > cut) for cut in (0.0, 0.5, 1.5, 2.5)]
            assert best.f1[feature] == pytest.approx(max(tried))
            reached = _f1(y, x[:, feature] > best.threshold[feature])
            assert reached == pytest.approx(best.f1[feature])
    (silent,) = best_thresholds(np.zeros((5, 2), np.float32), np.ones((5, 1), bool))
    assert silent.f1.tolist() == [0, 0]


def test_draws_are_those_of_repeating_images():
    rng = np.random.default_rng(1)
    image = np.repeat(np.arange(10), 3)
    said, truth = rng.random(30) < 0.5, rng.random(30) < 0.4
    scores = rng.integers(0, 5, 30).astype(np.float32)
    weights = drawn_images(10, 0)
    assert (weights[0] == 1).all() and (weights.sum(1) == 10).all()
    f1 = f1_draws(said, truth, weights[:, image])
    auroc = auroc_draws(scores, truth, weights[:, image])
    for r in (0, 1, 17):
        again = np.repeat(np.arange(30), weights[r, image].astype(int))
        assert f1[r] == pytest.approx(_f1(truth[again], said[again]))
        assert auroc[r] == pytest.approx(roc_auc_score(truth[again], scores[again]))
    nothing = np.zeros(30, dtype=bool)
    assert f1_draws(nothing, nothing, weights[:, image])[0] == 0
    assert auroc_draws(scores, nothing, weights[:, image])[0] == 0.5


def test_features_are_joined_as_long_as_that_helps():
    truth = np.array([True] * 6 + [False] * 6)
    first, second, noise = np.zeros((3, 12), dtype=bool)
    first[:4], second[4:6], noise[6:] = True, True, True
    says = np.stack([noise, second, first], axis=1)
    f1 = np.array([_f1(truth, column) for column in says.T])
    assert join(says, truth, f1) == [2, 1]


def test_a_planted_value_has_its_feature_and_a_split_one_two():
    n, rng = 80, np.random.default_rng(2)
    label = rng.integers(0, 3, n)
    half = rng.random(n) < 0.5
    x = rng.random((n, 6)).astype(np.float32) * 0.1
    x[:, 0] += label == 0
    x[:, 1] += (label == 1) & half
    x[:, 2] += (label == 1) & ~half
    names = ("a", "b", "c")
    of = Samples(
        factor="shape", names=names, image=np.arange(n), cell=None, label=label, n_images=n
    )
    found = value_features(x, of, 0).set_index("value")
    assert found.loc["a", "feature"] == 0 and found.loc["a", "f1"][0] == 1
    assert sorted(found.loc["b", "joined"]) == [1, 2]
    assert found.loc["b", "f1"][0] < 0.8 < found.loc["b", "union"][0]
    assert found.loc["a", "auroc"][0] == 1
    assert found.loc["a", "base"] == pytest.approx((label[40:] == 0).mean())
    states = [state_of(row, probed) for row, probed in (
        (found.loc["a"].to_dict(), 1.0), (found.loc["b"].to_dict(), 1.0),
        (found.loc["c"].to_dict() | {"union": [0.1]}, 0.9),
        (found.loc["c"].to_dict() | {"union": [0.1]}, 0.5),
    )]  # fmt: skip
    assert states == ["own", "split over 2", "hidden", "absent"]
    floor = value_features(x, of.shuffled(3), 0)
    assert max(draws[0] for draws in floor["f1"]) < 0.8


def test_linear_answers_are_right_where_they_can_be():
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, 200)
    x = np.eye(3)[label] + 0.1 * rng.normal(size=(200, 3))
    assert (fitted_answers(x[:100], label[:100], x[100:]) == label[100:]).mean() > 0.98
    assert fitted_answers(x[:5], np.full(5, 2), x[5:9]).tolist() == [2] * 4


# ------------------------------------------------------------------------------------- locality


def test_the_change_inside_and_outside_a_map():
    pixel = torch.zeros(2, 8, 8)
    pixel[0, :2, :2], pixel[0, 7, 7] = 0.5, 0.3
    maps = torch.zeros(2, 4, 4, dtype=torch.bool)
    maps[0, 0, 0] = True
    inside_, outside = split_means(pixel, maps)
    assert inside_[0] == pytest.approx(0.5) and outside[0] == pytest.approx(0.3 / 60)
    assert torch.isnan(inside_[1]) and outside[1] == 0
    assert shares(np.array([0.3, 0.0]), np.array([0.1, 0.0]))[0] == pytest.approx(0.75)
    assert np.isnan(shares(np.array([0.0]), np.array([0.0])))[0]


def test_controls_have_the_features_length_and_other_directions():
    W_dec = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    found = controls(W_dec, torch.tensor([0, 1, 3]), 0, seeded(0))
    assert torch.equal(found["feature"], W_dec[0])
    assert all(direction.norm() == pytest.approx(2) for direction in found.values())
    other = found["random feature"].nonzero().flatten().tolist()
    assert other in ([1], [3]) and (found["random direction"] != 0).sum() == 4


def test_amounts_multiply_and_add_where_the_feature_fires():
    settings = replace(PRESETS["quick"], factors=(0.0, 3.0), doses=(4.0, 16.0))
    found = amounts(torch.tensor([[0.0, 2.0]]), 0.5, settings)
    shown = [(op, amount, change.tolist()) for op, amount, change in found]
    assert shown == [("times", 0.0, [[0, -2]]), ("times", 3.0, [[0, 4]]), ("plus", 4.0, [[0, 2]])]


def test_only_images_that_a_map_divides_are_suitable():
    maps = torch.zeros(4, 4, 4)
    maps[1, 0, 0], maps[2] = 1.0, 1.0
    maps[3, :3] = 1.0  # twelve of sixteen: just not too many
    assert suitable(one_feature_codes(maps), 1).tolist() == [1, 3]


def test_a_change_sets_or_adds_at_its_steps():
    x = torch.ones(2, 3, 4)
    value = torch.full((1, 3, 4), 5.0)
    add = Change(block="mid.0", op="add", value=value, steps=(1, 2))
    assert torch.equal(add.made(x, step=0), x) and torch.equal(add.made(x, step=2), x)
    assert torch.equal(add.made(x, step=1), x + 5)
    put = Change(block="mid.0", op="set", value=value)
    assert torch.equal(put.made(x, step=7), torch.full((2, 3, 4), 5.0))
    of_each = replace(put, value=torch.arange(2.0)[:, None, None].expand(2, 3, 4))
    assert of_each.of(slice(1, 2)).value[0, 0, 0] == 1
    before = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    after = torch.tensor([[[[0, 51, 102]]]], dtype=torch.uint8)
    assert moved(after, before).item() == pytest.approx(0.2)


# --------------------------------------------------------------------------------------- scores


def test_agreement_is_the_share_of_pairs():
    values = torch.tensor([[0, 1], [0, 2], [3, 2]])
    # First column: one pair of three agrees; second column: one of three.
    assert block_roles_scores.agreement(values) == pytest.approx(1 / 3)


def test_colour_distance_by_hand():
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0, :4, :4] = 1.0  # red where the region is
    images[1, 2] = 0.5
    regions = torch.zeros(2, 2, 2, dtype=torch.bool)
    regions[0, 0, 0] = True  # the other's region is empty, so its whole image counts
    assert block_roles_scores.colour_distance(images, regions) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("texture", "energy"), [("plain", 0.0), ("striped", 1.0), ("checkered", 1.0)]
)
def test_textures_have_their_energy_at_their_period(texture, energy):
    """A square wave has most of its energy at its period; one both ways that share squared."""
    rows = (torch.arange(32) // 4 % 2)[:, None].expand(32, 32)
    pattern = {"plain": 0 * rows, "striped": rows, "checkered": rows ^ rows.T}[texture]
    patch = pattern.float()[None, None].expand(1, 3, 32, 32)
    found = block_roles_scores.texture_energy(patch).item()
    # Of 8 samples a period: 2 |F_1|^2 with |F_1| = 1 / (4 sin(pi / 8)), of a variance of 1 / 4.
    wave = 2 / (16 * np.sin(np.pi / 8) ** 2) / 4 / 0.25
    wanted = {"plain": 0.0, "striped": wave, "checkered": wave**2}[texture]
    assert found == pytest.approx(wanted, rel=1e-4) and (found > 0) == (energy > 0)


def test_a_cell_is_cut_out_of_each_image():
    images = torch.arange(2 * 3 * 64 * 64, dtype=torch.float32).reshape(2, 3, 64, 64)
    cells = block_roles_scores.cells_of(images, torch.tensor([1, 2]))
    assert torch.equal(cells[0], images[0, :, :32, 32:])
    assert torch.equal(cells[1], images[1, :, 32:, :32])


def test_composition_is_how_far_a_feature_keeps_to_things_or_off_them():
    things = torch.zeros(1, 16, dtype=torch.bool)
    things[0, :4] = True
    on, off, even = torch.zeros(3, 1, 4, 4)
    on[0, 0], off[0, 1:], even[:] = 1.0, 1.0, 1.0

    def score(maps):
        return block_roles_scores.composition(one_feature_codes(maps), 1, things)

    assert score(on) == 1 and score(off) == 1 and score(even) == pytest.approx(0)
    half = on.clone()
    half[0, 3] = 1.0  # half of it on things, which are a quarter of the places
    assert score(half) == pytest.approx((0.5 - 0.25) / 0.75)


# -------------------------------------------------------------------------- transport, k and width


def test_places_of_transport():
    cells = torch.tensor([0, 3, 1])
    assert inside("position", cells).tolist() == [[True, False], [False, True]]
    assert inside("light", cells).all() and mask_of("light", cells) is None
    at_home = torch.tensor([2, 2, -1])
    mask = mask_of("shape", at_home)
    assert mask is not None and mask.tolist() == [[0, 0], [1, 0]]


def transport_rows(
    success: dict[tuple[str, int], tuple[float, float]], n: int = 20
) -> pd.DataFrame:
    """Pairs of which each way moves and harms the first so many."""
    rows = []
    for (method, k), (moved_, others) in success.items():
        rows += [
            {"method": method, "k": k, "m": 1.0, "factor": "shape", "unit": unit, "counts": True,
             "moved": unit // 2 < moved_ * n / 2, "others": unit // 2 < others * n / 2,
             "outside": 0.0}
            for unit in range(n)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def test_transport_is_compared_at_the_same_cost():
    rows = transport_rows(
        {
            ("features", 5): (0.8, 0.1), ("features", 50): (0.9, 0.9),
            ("neurons", 5): (0.5, 0.1), ("neurons", 50): (1.0, 0.8),
            ("whole updates", 0): (1.0, 0.2),
        }
    )  # fmt: skip
    means = block_roles_numbers.transport_means(rows)
    best, rival = block_roles_numbers.settings_at_cost(means, "neurons")
    assert (best["k"], rival["k"]) == (5, 5)
    assert block_roles_numbers.at_matched_cost(rows, "neurons").value == pytest.approx(0.3)
    # Whole updates cost more at every setting: their cheapest is taken, and moves more.
    assert block_roles_numbers.at_matched_cost(rows, "whole updates").value == pytest.approx(-0.2)
    none = rows.assign(counts=False)
    assert np.isnan(block_roles_numbers.at_matched_cost(none, "neurons").value)


def test_neighbours_in_k_or_width_share_the_other():
    widths = pd.DataFrame(
        [
            {"block": "mid.0", "k": k, "d_sae": d, "explained": [value, value]}
            for k, d, value in ((5, 64, 0.1), (10, 64, 0.4), (20, 64, 0.6), (10, 128, 0.9))
        ]
    )
    steps = [round(float(step[0]), 6) for _, step in neighbours(widths, "k", "explained")]
    assert steps == [0.3, 0.2]
    assert [round(float(s[0]), 6) for _, s in neighbours(widths, "d_sae", "explained")] == [0.5]
    assert not neighbours(pd.DataFrame(), "k", "explained")


# --------------------------------------------------------------------------------------- options


def test_options_take_the_presets_values_unless_named():
    assert settle(Config()) == PRESETS["quick"]
    assert settle(Config(preset="full", pairs=7)).pairs == 7
    with pytest.raises(UserError, match="images must be at least 20, got 3"):
        settle(Config(images=3))


# --------------------------------------------------------------------------------------- verdicts


def test_a_block_decides_a_role_that_it_mostly_moves():
    """Before all other blocks, and at least half of the pairs: one factor of four is not enough."""
    share = {
        ("down.2.1", "position"): 1.0, ("down.2.1", "size"): 0.75, ("mid.0", "size"): 0.25,
        ("up.0.0", "shape"): 0.25, ("up.0.1", "texture"): 1.0,
    }  # fmt: skip
    rows = [
        {"weights": "trained", "what": "patch", "block": block, "factor": factor, "unit": unit,
         "counts": True, "moved": unit < 4 * share.get((block, factor), 0.0)}
        for block in CARRYING_SITES for factor in FACTORS for unit in range(4)
    ]  # fmt: skip
    measured = Measured(
        config=Config(), settings=replace(PRESETS["quick"], pairs=4), model="toy-turbo",
        blocks=CARRYING_SITES, twins=(), known=True, fidelity={},
        tables={"causes": pd.DataFrame(rows)},
    )  # fmt: skip
    found = {v.claim.split()[2]: v for v in verdicts(measured) if "decides" in v.claim}
    assert {block: v.holds for block, v in found.items()} == {
        "down.2.1": True, "up.0.0": False, "up.0.1": False,
    }  # fmt: skip
    assert found["down.2.1"].value == pytest.approx(0.875 - 0.125)
    assert "one by one: position 100 %, size 75 %" in found["down.2.1"].statistic
    assert "colour 0 %, texture 100 %, background 0 %" in found["up.0.1"].statistic
