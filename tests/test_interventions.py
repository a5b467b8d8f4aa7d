"""Edits: every operation against numbers worked out by hand, at the right tokens, cache or not."""

from dataclasses import replace

import pytest
import torch

from probe.adapters import Moment
from probe.capture import capturing
from probe.errors import UserError
from probe.generation import GenerateConfig, generate, generate_rows, prompt_tokens
from probe.interventions import (
    Channels,
    Coordinate,
    Coordinates,
    Edit,
    Picked,
    Places,
    Rest,
    Turned,
    Where,
    applying,
    edited,
    positions_of_text,
)
from probe.sites import parse_site

SITE = parse_site("resid_post.0")
V = torch.tensor([3.0, 4.0])  # of length 5
X = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]]])  # coordinates 1, 2, 0 along V
ALL = Where(prompt=torch.ones(3, dtype=torch.bool))


def edit(
    op, value: float | torch.Tensor = 0.0, component=None, where: Where | Places = ALL, row=None
) -> Edit:
    return Edit(
        site=SITE, component=component or Coordinate(vector=V), op=op, where=where, row=row,
        value=value if isinstance(value, torch.Tensor) else torch.tensor([value]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "value", "coordinates"),
    [
        ("add", 0.5, [1.5, 2.5, 0.5]),
        ("set", -1.0, [-1, -1, -1]),
        ("scale", 3.0, [3, 6, 0]),
        ("clamp", 1.5, [1, 1.5, 0]),
        ("clamp", -1.5, [1, 1.5, 0]),
        ("zero", 9.0, [0, 0, 0]),
        ("mean_ablate", 0.25, [0.25, 0.25, 0.25]),
        ("patch", torch.tensor([[7.0], [8.0], [9.0]]), [7, 8, 9]),
        ("project_out", 9.0, [0, 0, 0]),
    ],
)
def test_operation_moves_the_coordinate_and_nothing_else(op, value, coordinates):
    new = edited(X, [edit(op, value)])
    across = torch.tensor([4.0, -3.0])
    assert torch.allclose(new @ V / 25, torch.tensor([coordinates], dtype=torch.float32))
    assert torch.allclose(new @ across, X @ across)


def test_project_out_ignores_what_reads_the_number():
    constant = Coordinate(vector=V, read=lambda x: torch.full((*x.shape[:2], 1), 5.0))
    assert torch.allclose(edited(X, [edit("project_out", component=constant)]) @ V, torch.zeros(3))
    moved = edited(X, [edit("zero", component=constant)])
    assert torch.allclose(moved, X - 5 * V)


def test_channels_are_changed_alone():
    second = Channels(start=1, stop=2)
    assert edited(X, [edit("zero", component=second)]).tolist() == [[[3, 0], [6, 0], [4, 0]]]
    both = Channels(start=0, stop=2)
    means = torch.tensor([1.0, 2.0])
    assert edited(X, [edit("mean_ablate", means, both)]).tolist() == [[[1, 2]] * 3]
    assert edited(X, [edit("scale", 2.0, both)]).tolist() == (2 * X).tolist()


def test_edits_of_a_site_read_the_unedited_activation():
    a, b = edit("scale", 2.0), edit("add", 10.0)
    expected = X + X @ V[:, None] / 25 * V + 10 * V
    assert torch.allclose(edited(X, [a, b]), expected)
    assert torch.allclose(edited(X, [b, a]), expected)


def test_only_the_chosen_tokens_and_rows_are_edited():
    where = Where(prompt=torch.tensor([False, True, False]))
    x = X.repeat(2, 1, 1)
    changed = edited(x, [edit("zero", where=where, row=1)]) != x
    assert changed.any(-1).tolist() == [[False] * 3, [False, True, False]]
    assert edited(X, [edit("add", 1.0, where=Where(prompt=torch.zeros(3, dtype=torch.bool)))]) is X


def test_positions_of_a_pass_follow_from_its_offset():
    where = Where(prompt=torch.tensor([False, True, False]), steps=(2, 4))
    # Positions 3, 4, 5, 6 are steps 1, 2, 3, 4.
    expected = [False, True, False, False, True, True, False]
    assert where.chosen(0, 7).tolist() == expected
    for offset in range(7):
        assert where.chosen(offset, 1).tolist() == [expected[offset]]
    endless = Where(prompt=torch.zeros(2, dtype=torch.bool), steps=(1, None))
    assert endless.chosen(0, 5).tolist() == [False, False, True, True, True]
    assert endless.chosen(100, 2).tolist() == [True, True]


def test_patch_stops_at_the_end_of_the_prompt():
    long = torch.cat([X, X], 1)
    where = Where(prompt=ALL.prompt, steps=(1, 1))
    new = edited(long, [edit("patch", torch.tensor([[7.0], [8.0], [9.0]]), where=where)])
    assert torch.allclose(new[0, :3] @ V / 25, torch.tensor([7.0, 8, 9]))
    assert torch.equal(new[0, 3:], X[0])


def test_turned_changes_have_the_same_size_in_another_direction():
    along = torch.tensor([0.0, 1.0])
    turned = Turned(component=Coordinate(vector=V), direction=along)
    assert edited(X, [edit("zero", component=turned)]).tolist() == [
        [[3, 4 - 5], [6, 8 - 10], [4, -3]]
    ]
    assert edited(X, [edit("project_out", component=turned)]).tolist() == [
        [[3, 4 - 5], [6, 8 - 10], [4, -3]]
    ]
    assert edited(X, [edit("add", 2.0, turned)]).tolist() == [[[3, 14], [6, 18], [4, 7]]]
    both = Turned(component=Channels(start=0, stop=2), direction=along)
    assert edited(X, [edit("zero", component=both)]).tolist() == [[[3, 9], [6, 18], [4, 2]]]


def test_several_coordinates_channels_and_what_a_dictionary_leaves_out():
    first_two = Coordinates(
        vectors=torch.tensor([[1.0, 1.0], [0.0, 2.0]]), read=lambda x: x[..., [1, 0]] * 10
    )
    # The numbers at the first token are 40 and 30.
    halved = edited(X, [edit("scale", 0.5, first_two)])
    assert halved[0, 0].tolist() == [3 - 20, 4 - 20 - 2 * 15]
    swapped = Picked(channels=torch.tensor([1, 0]))
    new = edited(X, [edit("set", torch.tensor([7.0, 8.0]), swapped)])
    assert new.tolist() == [[[8, 7]] * 3]
    rebuilt = Rest(rebuild=lambda x: torch.full_like(x, 2.5))
    assert edited(X, [edit("zero", component=rebuilt)]).tolist() == [[[2.5, 2.5]] * 3]
    half = Turned(component=swapped, direction=torch.tensor([0.0, 1.0]))
    assert edited(X, [edit("zero", component=half)]).tolist() == [[[3, 9], [6, 18], [4, 2]]]


def test_places_are_weighted_in_a_range_of_steps():
    where = Places(mask=torch.tensor([1.0, 0.5, 0.0]), steps=(1, 3))
    one = edit("add", 2.0, Channels(start=0, stop=1), where=where)
    for step in range(4):
        moved = edited(X, [one], Moment(step=step)) - X
        expected = [2.0, 1.0, 0.0] if step in (1, 2) else [0.0] * 3
        assert moved[0, :, 0].tolist() == expected and not moved[..., 1].any()
    everywhere = replace(one, where=Places())
    assert (edited(X, [everywhere], Moment(step=9)) - X)[0, :, 0].tolist() == [2.0] * 3
    with pytest.raises(UserError, match="the mask has 3 places and the site has 2"):
        edited(X[:, :2], [one], Moment(step=1))


def test_a_value_may_differ_by_step_and_place():
    values = torch.arange(6.0).reshape(2, 3, 1)
    one = edit("add", values, Channels(start=0, stop=1), where=Places())
    for step in (0, 1):
        moved = edited(X, [one], Moment(step=step)) - X
        assert torch.equal(moved[0, :, 0], values[step, :, 0])
    patched = edited(X, [replace(one, op="patch")], Moment(step=1))
    assert patched[0, :, 0].tolist() == [3, 4, 5] and torch.equal(patched[..., 1], X[..., 1])


@pytest.mark.parametrize(
    ("rows", "row", "expected"),
    [
        ("conditional", None, [0, 0, 1, 1]),
        ("unconditional", None, [1, 1, 0, 0]),
        ("both", None, [1, 1, 1, 1]),
        ("opposed", None, [-1, -1, 1, 1]),
        ("conditional", 1, [0, 0, 0, 1]),
        ("both", 0, [1, 0, 1, 0]),
        ("opposed", 1, [0, -1, 0, 1]),
    ],
)
def test_rows_of_guidance(rows, row, expected):
    """Two images: rows 0 and 1 read nothing, rows 2 and 3 their prompts."""
    one = edit("add", 1.0, Channels(start=0, stop=1), where=Places(rows=rows), row=row)
    x = X.repeat(4, 1, 1)
    moved = edited(x, [one], Moment(n_unconditional=2)) - x
    assert moved[:, 0, 0].tolist() == expected
    # Without guidance all rows are conditional.
    assert (edited(x[2:], [one]) - x[2:])[:, 0, 0].tolist() == expected[2:]


def test_what_replaces_an_activation_is_rounded_once():
    x = (1000 * torch.randn(1, 3, 2)).bfloat16()
    whole = Channels(start=0, stop=2)
    edits = [edit("zero", component=whole), edit("add", 0.1)]
    assert torch.equal(edited(x, edits), (0.1 * V).expand(1, 3, 2).bfloat16())


def test_dtype_is_kept():
    assert edited(X.bfloat16(), [edit("add", 1.0)]).dtype == torch.bfloat16


def test_text_marks_the_tokens_it_reaches_into():
    texts = ["<end>", "The", " sea", " and", " the", " seaside"]
    assert positions_of_text(texts, " sea").tolist() == [False, False, True, False, False, True]
    assert positions_of_text(texts, "a and").tolist() == [False, False, True, True, False, False]
    with pytest.raises(UserError, match="'ship' is not in the prompt"):
        positions_of_text(texts, "ship")
    with pytest.raises(UserError, match="'' is not in the prompt"):
        positions_of_text(texts, "")


# ------------------------------------------------------------------------------------- in a model


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return request.getfixturevalue(request.param)


def push(model, prompt, scale=30.0, steps=(1, None), row=None) -> Edit:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    return Edit(
        site=parse_site("resid_post.1"),
        component=Coordinate(vector=vector),
        op="add",
        where=Where(prompt=torch.ones(len(prompt), dtype=torch.bool), steps=steps),
        value=torch.tensor([scale]),
        row=row,
    )


def test_the_model_sees_the_edited_activation(model):
    tokens = prompt_tokens(model, "The sea")
    one = push(model, tokens)
    with capturing(model, [one.site], early_exit=False) as before:
        model.run(tokens[None])
    # Hooks run in the order they were hung: the edit first, then the reader.
    with applying(model, [one]), capturing(model, [one.site], early_exit=False) as after:
        model.run(tokens[None])
    assert isinstance(one.component, Coordinate)
    expected = before[one.site] + 30 * one.component.vector
    assert torch.allclose(after[one.site], expected, atol=1e-5)


def test_generation_is_the_same_with_and_without_a_cache(model):
    tokens = prompt_tokens(model, "The sea and the ship")
    for steps in ((1, None), (1, 1), (2, 5)):
        one = push(model, tokens, scale=3.0, steps=steps)
        texts = [
            generate(
                model, tokens, edits=[one], config=GenerateConfig(max_new_tokens=12, cache=cache)
            ).tokens.tolist()
            for cache in (True, False)
        ]
        assert texts[0] == texts[1], steps


def test_draws_are_those_of_the_seed(model):
    tokens = prompt_tokens(model, "The sea")
    config = GenerateConfig(max_new_tokens=8, temperature=1.0, seed=3)
    state = torch.random.get_rng_state()
    first, again = (generate(model, tokens, config=config).tokens.tolist() for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is left alone"


def test_rows_have_edits_of_their_own(model):
    tokens = prompt_tokens(model, "The sea and the ship")
    config = GenerateConfig(max_new_tokens=6)
    edits = [push(model, tokens, scale=scale, row=row) for row, scale in ((1, 3.0), (2, -3.0))]
    rows = generate_rows(model, tokens, 3, edits=edits, config=config)
    alone = [generate(model, tokens, config=config)] + [
        generate(model, tokens, edits=[push(model, tokens, scale=s)], config=config)
        for s in (3.0, -3.0)
    ]
    assert [row.tokens.tolist() for row in rows] == [one.tokens.tolist() for one in alone]


def test_tokens_are_heard_as_they_come(model):
    heard: list[int] = []
    tokens = prompt_tokens(model, "The sea")
    config = GenerateConfig(max_new_tokens=5)
    made = generate(model, tokens, config=config, on_token=heard.append)
    assert heard[: len(made.tokens)] == made.tokens.tolist()


def test_hooks_are_removed_when_the_pass_raises(model):
    tokens = prompt_tokens(model, "The sea")

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no reading")

    wrong = replace(
        push(model, tokens),
        op="zero",
        component=Coordinate(vector=torch.ones(model.d_model), read=fail),
    )
    clean = model.run(tokens[None])
    with pytest.raises(RuntimeError), applying(model, [wrong]):
        model.run(tokens[None])
    assert torch.equal(model.run(tokens[None]), clean)


def test_prompts_that_cannot_be_read(model):
    with pytest.raises(UserError, match="the prompt is empty"):
        prompt_tokens(model, "  ")
    with pytest.raises(UserError, match="no chat template"):
        prompt_tokens(model, "Hello", chat=True)
    with pytest.raises(UserError, match="reads at most 256"):
        prompt_tokens(model, "a" * 5000)
    with pytest.raises(UserError, match="max_new_tokens of 1 or more"):
        GenerateConfig(max_new_tokens=0)


def test_smollm2_answers_a_chat(smollm2):
    tokens = prompt_tokens(smollm2, "What is the capital of France?", chat=True)
    text = smollm2.tokenizer.decode(tokens)
    assert text.endswith("<|im_start|>assistant\n") and "capital of France" in text
    made = generate(smollm2, tokens, config=GenerateConfig(max_new_tokens=12))
    assert "Paris" in made.text
