"""toy-turbo's world: drawn scenes, captions and what the noise decides, against hand-made ones."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from probe.toyturbo.briefs import (
    LATENT_SIDE,
    UNSAID,
    Brief,
    captions,
    describe,
    draw_briefs,
    scores,
    settle,
)
from probe.toyturbo.fitting import seeded
from probe.toyturbo.parts import MAX_TOKENS, make_tokenizer
from probe.toyturbo.reader import accuracy, random_scenes
from probe.toyturbo.world import (
    ABSENT,
    BACKGROUNDS,
    COLOURS,
    DARK,
    FACTORS,
    SCENE_FACTORS,
    SHADE,
    SIDE,
    THING_FACTORS,
    Detail,
    Scenes,
    object_mask,
    render,
)

DISC, SQUARE, TRIANGLE, CROSS = range(4)
SMALL, LARGE = range(2)
PLAIN, STRIPED, CHECKERED = range(3)
RED, ORANGE, YELLOW, GREEN, CYAN, BLUE, PURPLE, WHITE = range(8)
LEFT, RIGHT, ABOVE, BELOW = range(4)


def one_thing(cell: int, values: tuple[int, int, int, int], surround=(0, LEFT)) -> Scenes:
    things = torch.full((1, 4, 4), ABSENT)
    things[0, cell] = torch.tensor(values)
    return Scenes(things=things, surround=torch.tensor([surround]))


def rgb(image: torch.Tensor, y: int, x: int) -> list[float]:
    return image[0, :, y, x].tolist()


def lit(colour: tuple[int, int, int], along: int, dark: float = 1.0) -> list[float]:
    """A colour under light that falls from 1 to SHADE over the image's 64 pixels."""
    share = 1 + (SHADE - 1) * along / (SIDE - 1)
    return [value / 255 * share * dark for value in colour]


def test_a_plain_square_has_its_colour_and_the_ground_around_it():
    image = render(one_thing(1, (SQUARE, RED, LARGE, PLAIN), (2, LEFT)))
    assert image.shape == (1, 3, 64, 64)
    # Cell 1 is the top right: its centre is at row 16, column 48.
    assert rgb(image, 16, 48) == pytest.approx(lit(COLOURS[RED], 48))
    # A large square's half side is .88 x 14.5 = 12.76: twelve pixels from the centre are inside.
    assert rgb(image, 16, 48 + 11) == pytest.approx(lit(COLOURS[RED], 59))
    assert rgb(image, 16, 48 + 14) == pytest.approx(lit(BACKGROUNDS[2], 62))
    assert rgb(image, 48, 16) == pytest.approx(lit(BACKGROUNDS[2], 16))


@pytest.mark.parametrize(
    ("light", "y", "x", "along"),
    [(LEFT, 3, 9, 9), (RIGHT, 3, 9, 54), (ABOVE, 3, 9, 3), (BELOW, 3, 9, 60)],
)
def test_light_falls_from_its_side(light, y, x, along):
    image = render(one_thing(3, (DISC, BLUE, SMALL, PLAIN), (0, light)))
    assert rgb(image, y, x) == pytest.approx(lit(BACKGROUNDS[0], along))


def test_textures_alternate_every_four_pixels():
    striped = render(one_thing(0, (SQUARE, GREEN, LARGE, STRIPED)))
    checkered = render(one_thing(0, (SQUARE, GREEN, LARGE, CHECKERED)))
    for y, dark in ((9, 1.0), (13, DARK), (17, 1.0)):
        assert rgb(striped, y, 9) == pytest.approx(lit(COLOURS[GREEN], 9, dark))
        assert rgb(striped, y, 13) == pytest.approx(lit(COLOURS[GREEN], 13, dark))
    assert rgb(checkered, 9, 9) == pytest.approx(lit(COLOURS[GREEN], 9))
    assert rgb(checkered, 9, 13) == pytest.approx(lit(COLOURS[GREEN], 13, DARK))
    assert rgb(checkered, 13, 13) == pytest.approx(lit(COLOURS[GREEN], 13))


def test_outlines_cover_the_areas_of_their_formulas():
    def area(shape: int) -> float:
        return float(object_mask(one_thing(2, (shape, RED, LARGE, PLAIN))).sum())

    r = 14.5
    assert area(DISC) == pytest.approx(np.pi * r**2, rel=0.01)
    assert area(SQUARE) == pytest.approx((2 * 0.88 * r) ** 2, rel=0.01)
    # Apex at -r, base at .9 r, and as wide as high.
    assert area(TRIANGLE) == pytest.approx((1.9 * r) ** 2 / 2, rel=0.03)
    arm = 2 * 0.38 * r
    assert area(CROSS) == pytest.approx(2 * 2 * r * arm - arm**2, rel=0.02)


def test_less_detail_draws_plain_discs():
    shown = render(
        one_thing(0, (CROSS, CYAN, SMALL, CHECKERED)), Detail(shapes=False, textures=False)
    )
    assert torch.equal(shown, render(one_thing(0, (DISC, CYAN, SMALL, PLAIN))))


def brief(count: int, first: list[int], second: list[int] | None, surround: list[int]) -> Brief:
    things = torch.tensor([[first, second or [UNSAID] * 5]])
    return Brief(count=torch.tensor([count]), things=things, surround=torch.tensor([surround]))


def test_captions_say_what_is_known_and_nothing_else():
    whole = brief(2, [0, DISC, RED, LARGE, STRIPED], [3, CROSS, ORANGE, SMALL, PLAIN], [2, ABOVE])
    assert describe(whole) == [
        "a large red striped disc at the top left and a small orange plain cross at the bottom "
        "right on a navy background lit from above"
    ]
    gaps = brief(1, [UNSAID, UNSAID, ORANGE, UNSAID, UNSAID], None, [UNSAID, RIGHT])
    assert describe(gaps) == ["an orange thing lit from the right"]
    assert describe(brief(UNSAID, [UNSAID] * 5, None, [UNSAID, UNSAID])) == [""]
    assert describe(whole.without("colour").without("background")) == [
        "a large striped disc at the top left and a small plain cross at the bottom right lit from "
        "above"
    ]


def test_every_word_is_one_token_and_captions_fit():
    tokenizer, written = make_tokenizer(), captions(3)
    for _ in range(200):
        caption = next(written)
        ids = tokenizer(caption)["input_ids"]
        assert len(ids) == len(caption.split()) + 2 <= MAX_TOKENS
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).split() == caption.split()


SIGNS = {
    "mean": (1, 1, 1, 1),
    "across": (1, -1, 1, -1),
    "down": (1, 1, -1, -1),
    "chequered": (1, -1, -1, 1),
}


def noise_of(cell: int, heights: dict[tuple[str, int], float]) -> torch.Tensor:
    """Noise with some contrasts in every patch of a cell, quarter by quarter; else zero."""
    noise, (row, column) = torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE), divmod(cell, 2)
    for (kind, channel), height in heights.items():
        for y in range(16 * row, 16 * row + 16):
            for x in range(16 * column, 16 * column + 16):
                quarter = 2 * (y % 4 // 2) + x % 4 // 2
                noise[0, channel, y, x] += SIGNS[kind][quarter] * height
    return noise


def test_scores_are_those_of_the_patches_one_by_one():
    noise = noise_of(1, {("across", 2): 0.5, ("mean", 3): -0.25})
    expected = torch.zeros(1, 4, 16)
    # 256 latents of one height sum to 256 h; a standard normal score is the sum over 16.
    expected[0, 1, 4 + 2], expected[0, 1, 3] = 16 * 0.5, 16 * -0.25
    assert torch.allclose(scores(noise), expected, atol=1e-5)
    white = scores(torch.randn(4000, 4, 32, 32, generator=seeded(3))).flatten(1)
    assert torch.allclose(torch.cov(white.T), torch.eye(64), atol=0.1)


def test_noise_fills_the_gaps_by_the_written_rule():
    thing = {
        ("mean", 0): 1, ("mean", 1): 1, ("mean", 2): -1,  # 4 + 2 + 0: purple
        ("mean", 3): 1,  # large
        ("across", 0): 1, ("across", 1): -1,  # 2 + 0: triangle
        ("across", 2): -1, ("across", 3): -0.1,  # just past half the circle: the second third
        ("down", 0): 2,  # this cell
        ("down", 1): -1, ("down", 2): 1,  # 0 + 1: brown
        ("chequered", 0): 1, ("chequered", 1): 1,  # 2 + 1: below
    }  # fmt: skip
    # More than a cell's worth elsewhere turns the scene's signs, not the thing's.
    elsewhere = noise_of(0, {("down", 1): 3, ("mean", 0): -9})
    open_ = brief(1, [UNSAID] * 5, None, [UNSAID, UNSAID])
    scene = settle(open_, noise_of(2, thing) + elsewhere)
    drawn = [TRIANGLE, PURPLE, LARGE, STRIPED]
    assert scene.things[0].tolist() == [[ABSENT] * 4, [ABSENT] * 4, drawn, [ABSENT] * 4]
    assert scene.surround.tolist() == [[3, BELOW]]


def test_what_is_said_is_drawn_whatever_the_noise():
    generator = seeded(1)
    said = draw_briefs(50, generator)
    scenes = [settle(said, torch.randn(50, 4, 32, 32, generator=generator)) for _ in range(2)]
    assert torch.equal(scenes[0].things, scenes[1].things)
    assert torch.equal(scenes[0].surround, scenes[1].surround)
    cells, rows = said.things[:, 0, 0], torch.arange(50)
    assert torch.equal(scenes[0].things[rows, cells], said.things[:, 0, 1:])
    assert torch.equal(scenes[0].present.sum(1), said.count)


def test_a_thing_without_a_place_keeps_off_the_other():
    open_ = brief(2, [UNSAID, DISC, RED, SMALL, PLAIN], [2, CROSS, BLUE, LARGE, PLAIN], [0, 0])
    # The noise would rather have the cell that is taken.
    scene = settle(open_, noise_of(2, {("down", 0): 9}) + noise_of(1, {("down", 0): 1}))
    assert scene.factor("shape").tolist() == [[ABSENT, DISC, CROSS, ABSENT]]


def test_a_factor_is_left_out_alone():
    open_ = draw_briefs(400, seeded(4), gaps=1.0, alone=1.0)
    things = open_.things[:, 0] == UNSAID
    left_out = torch.cat([things, open_.surround == UNSAID], dim=1)
    assert (left_out.sum(1) == 1).all() and (left_out.sum(0) > 400 / 7 / 2).all()
    two = open_.count == 2
    assert torch.equal(open_.things[two, 1] == UNSAID, things[two]), "of both things"


def test_what_noise_decides_has_the_worlds_distribution():
    n, generator = 8000, seeded(2)
    nothing = draw_briefs(n, generator, empty=1.0)
    assert set(describe(nothing)) == {""}
    scenes = settle(nothing, torch.randn(n, 4, 32, 32, generator=generator))
    for name, values in FACTORS.items():
        if name == "position":
            drawn = scenes.present.nonzero()[:, 1]
        else:
            drawn = scenes.factor(name)
            drawn = drawn if name in SCENE_FACTORS else drawn[scenes.present]
        shares = torch.bincount(drawn, minlength=len(values)) / len(drawn)
        # Five standard errors of a share of 8,000 draws.
        assert torch.allclose(shares, torch.tensor(1 / len(values)), atol=5 * 0.5 / n**0.5)


def test_captions_begin_again_from_the_seed():
    first, second = captions(7), captions(7)
    assert [next(first) for _ in range(100)] == [next(second) for _ in range(100)]


def test_accuracy_counts_each_factor_by_hand():
    true = one_thing(1, (DISC, RED, SMALL, PLAIN), (1, ABOVE))
    read = one_thing(1, (DISC, BLUE, SMALL, STRIPED), (1, BELOW))
    found = accuracy(read, true)
    assert found == {
        "position": (4, 4), "shape": (1, 1), "colour": (0, 1), "size": (1, 1),
        "texture": (0, 1), "background": (1, 1), "light": (0, 1),
    }  # fmt: skip
    missed = accuracy(one_thing(0, (DISC, RED, SMALL, PLAIN), (1, ABOVE)), true)
    assert missed["position"] == (2, 4) and missed["shape"] == (0, 1)


def test_random_scenes_have_one_or_two_things():
    scenes = random_scenes(500, seeded(4))
    assert set(scenes.present.sum(1).tolist()) == {1, 2}
    assert len(THING_FACTORS) == scenes.things.shape[2]


def test_loading_the_package_says_nothing():
    """Libraries under it warn of packages that are not used here; nobody is to see that."""
    command = [sys.executable, "-c", "import probe.toyturbo.making"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == found.stderr == ""
