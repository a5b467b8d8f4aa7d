"""`lorgnette steer`: a model as it is and a steered one, side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from app.commands.options import Common, plan, say, show
from app.drawings import drawing_run, moved_rows
from probe.errors import UserError
from probe.generation import GenerateConfig
from probe.runs import Run, write_json
from saes import drawing
from saes.recipes import (
    Feature,
    Features,
    FileDirection,
    Head,
    Neuron,
    Neurons,
    Recipe,
    Reconstruction,
    Strength,
    Target,
    WholeSite,
    read_recipe,
)
from saes.steering import Comparison, Steering, prepare

GENERATE = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "cache")
TEXT_OPTIONS = ("chat", "out", *GENERATE)
IMAGE_OPTIONS = ("images_at_once",)
SEEDS = (42,)
"""Of images, where neither the person nor the recipe says any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Show what recipes do: the model's own text and the steered one, or images before and after.

    A recipe is a JSON file that says which features, directions, neurons or heads of a model are
    changed, how much and at which tokens, or at which places of an image; `saes/recipes.py`
    describes it, the dashboard makes them. Steering keeps what the SAE cannot reconstruct: the
    activation becomes x + delta.

    Example: lorgnette steer artifacts/recipes/*.json --prompt "The captain looked at"

    Of images, written as PNG files: lorgnette steer red.json --prompt "a blue circle" --seed 1 2 3
    """

    recipes: Annotated[Positional[tuple[Path, ...]], arg(metavar="RECIPE")]
    """Files of recipes."""
    prompt: tuple[str, ...] = ()
    """What to go on from, or to draw; each recipe's own prompts where none is given."""
    seed: tuple[int, ...] = ()
    """Images: every prompt is drawn from each of these, the recipe's own or 42 if not given. Text:
    the one seed of the draws, 0 if not given."""
    times: float = 1.0
    """Multiply every strength by this; 0 is no steering."""
    chat: bool = False
    """Text: put the prompts into the model's chat template."""
    max_new_tokens: int | None = None
    """Text: tokens to write at most, 40 if not given; fewer where the model ends its text."""
    temperature: float | None = None
    """Text: 0 takes the likeliest token each time (so if not given), above it they are drawn."""
    top_p: float | None = None
    """Text: draw from the likeliest tokens that hold this share of the probability; 1 if not
    given."""
    repetition_penalty: float | None = None
    """Text: above 1, tokens that have been there are made less likely; 1 if not given."""
    cache: bool = True
    """Text: keep keys and values of past tokens; without, each step reads the whole text again."""
    out: Path | None = None
    """Text: also write everything to this JSON file."""
    images_at_once: int = 1
    """Images in a batch; with more than one, some may differ in the last bit from those drawn
    alone."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> list[Path]:
    """Run every recipe on every prompt; gives the folders of images and the file of `--out`."""
    recipes = [read_recipe(path) for path in command.recipes]
    if not recipes:
        raise UserError("no recipe was given; name one or more recipes' files.")
    check_options(command, recipes)
    if command.common.dry_run:
        for recipe in recipes:
            of_images = recipe.draw is not None
            say((image_plan if of_images else dry_run_plan)(command, recipe))
        return []
    folders = draw_all(command, [recipe for recipe in recipes if recipe.draw is not None])
    documents = write_all(command, [recipe for recipe in recipes if recipe.draw is None])
    if command.out is None:
        return folders
    write_json(command.out, documents)
    return [*folders, command.out]


def check_options(command: Command, recipes: list[Recipe]) -> None:
    """Raise `UserError` where an option is given that none of the recipes takes."""
    of_images = {recipe.draw is not None for recipe in recipes}
    if len(of_images) == 2:
        return
    default = Command(recipes=())
    others = TEXT_OPTIONS if True in of_images else IMAGE_OPTIONS
    given = [name for name in others if getattr(command, name) != getattr(default, name)]
    if given:
        kind = "draws images" if True in of_images else "is of texts"
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"the recipe {recipes[0].name!r} {kind} and does not take {named}; `lorgnette steer "
            "--help` says which options are for text and which for images."
        )
    if False in of_images and len(command.seed) > 1:
        raise UserError(f"a text is drawn from one seed; got {len(command.seed)} for --seed.")


def write_all(command: Command, recipes: list[Recipe]) -> list[dict[str, Any]]:
    """Run the recipes of texts and show what they do; gives it as JSON."""
    documents: list[dict[str, Any]] = []
    steering: Steering | None = None
    for recipe in recipes:
        # Recipes of one model in a row share it.
        shared = steering.model if steering and steering.recipe.model == recipe.model else None
        steering = prepare(recipe, root=command.common.root, model=shared, device=command.device)
        for prompt in prompts_of(command, recipe):
            compared = steering.compare(
                prompt, generate_config(command), chat=command.chat, times=command.times
            )
            show(comparison_table(recipe, compared))
            documents.append({"recipe": recipe.name} | document(compared))
    return documents


def generate_config(command: Command) -> GenerateConfig:
    """How texts are written. Raises `UserError` where that makes no sense."""
    given = {name: getattr(command, name) for name in GENERATE}
    given = {name: value for name, value in given.items() if value is not None}
    return GenerateConfig(**given, seed=command.seed[0] if command.seed else 0)


def draw_all(command: Command, recipes: list[Recipe]) -> list[Path]:
    """Run the recipes of images, write what they do, and show how far the images moved."""
    folders: list[Path] = []
    ready: drawing.Drawing | None = None
    for recipe in recipes:
        shared = ready.model if ready and ready.recipe.model == recipe.model else None
        prompts = prompts_of(command, recipe)
        ready = drawing.prepare(
            recipe, root=command.common.root, model=shared, device=command.device
        )
        made = drawing_run(
            ready, prompts, seeds_of(command, recipe), times=command.times,
            at_once=command.images_at_once, root=command.common.root,
        )  # fmt: skip
        show(moved_table(recipe, made))
        folders.append(made.path)
    return folders


def moved_table(recipe: Recipe, made: Run) -> Table:
    """How far each image moved."""
    table = Table(
        "prompt", "seed", "moved", "inside the mask", "outside", "before, after, both",
        title=escape(recipe.name), title_justify="left",
        caption="mean change of a pixel's channels, in levels of 0 to 255",
    )  # fmt: skip
    for row in moved_rows(made):
        numbers = ["-" if row[k] is None else f"{row[k]:.3g}" for k in ("whole", "inside")]
        outside = "-" if row["outside"] is None else f"{row['outside']:.3g}"
        table.add_row(escape(row["prompt"]), str(row["seed"]), *numbers, outside, row["folder"])
    return table


def prompts_of(command: Command, recipe: Recipe) -> tuple[str, ...]:
    """The prompts asked for, else the recipe's own. Raises `UserError` where there are none."""
    prompts = command.prompt or recipe.prompts
    if not prompts:
        raise UserError(
            f'the recipe {recipe.name!r} has no prompts of its own; give --prompt "...".'
        )
    return prompts


def seeds_of(command: Command, recipe: Recipe) -> tuple[int, ...]:
    """The seeds of images asked for, else the recipe's own, else `SEEDS`."""
    return command.seed or recipe.seeds or SEEDS


def comparison_table(recipe: Recipe, compared: Comparison) -> Table:
    """Both texts side by side, and what changed at the next token."""
    table = Table(
        "default", "steered", title=escape(f"{recipe.name}: {compared.prompt}"),
        title_justify="left", show_lines=True,
    )  # fmt: skip
    table.add_row(escape(compared.default.text.strip()), escape(compared.steered.text.strip()))
    default, steered = (
        ", ".join(
            f"{row['text']!r} {row[side]:.1%}" for row in compared.next_token.to_dict("records")
        )
        for side in ("default", "steered")
    )
    table.add_row(escape(f"next token: {default}"), escape(f"next token: {steered}"))
    table.caption = f"KL of the next token {compared.kl:.3g} nats"
    return table


def document(compared: Comparison) -> dict[str, Any]:
    """A comparison as JSON."""
    return {
        "prompt": compared.prompt,
        "default": compared.default.text,
        "steered": compared.steered.text,
        "kl": compared.kl,
        "next_token": compared.next_token.astype({"default": float, "steered": float}).to_dict(
            "records"
        ),
    }


def dry_run_plan(command: Command, recipe: Recipe) -> Table:
    """What a recipe of texts would do, in words."""
    n_tokens = generate_config(command).max_new_tokens
    rows = {"tokens": f"up to {n_tokens} for each, with and without"}
    return _plan(command, recipe, rows)


def image_plan(command: Command, recipe: Recipe) -> Table:
    """What a recipe of images would do, in words."""
    draw = recipe.draw
    assert draw is not None
    n_seeds = len(seeds_of(command, recipe))
    n_images = n_seeds * len(prompts_of(command, recipe))
    sources = {edit.source for edit in recipe.edits} - {None}
    guided = f", guidance {draw.guidance:g} (two rows a pass)" if draw.guided else ""
    size = (
        "the model's own size" if draw.height is None and draw.width is None
        else f"{draw.height or 'own'} by {draw.width or 'own'} pixels"
    )  # fmt: skip
    rows = {
        "images": f"{n_images} ({n_seeds} seeds a prompt) of {size}, each before and after",
        "steps": f"{draw.steps} an image{guided}",
        "passes of the U-Net": str(draw.steps * n_images * (2 + len(sources))),
        "files": f"{3 * n_images} PNG below {command.common.root / 'drawings'}",
    }
    return _plan(command, recipe, rows)


def _plan(command: Command, recipe: Recipe, more: dict[str, str]) -> Table:
    rows = {
        "model": recipe.model.spec,
        "SAEs": ", ".join(sae.name for sae in recipe.saes.values()) or "none",
        "prompts": str(len(prompts_of(command, recipe))),
    } | more
    for i, edit in enumerate(recipe.edits, 1):
        amount = strength_words(edit.strength)
        source = "" if edit.source is None else f", from {edit.source!r}"
        target = target_words(edit.target)
        rows[f"edit {i}"] = escape(f"{edit.op} {target} at {edit.site}{amount}{source}")
    return plan(escape(f"{recipe.name} would be run"), rows)


def target_words(target: Target) -> str:
    """What an edit is of, in words."""
    match target:
        case WholeSite():
            return "the whole site"
        case Feature():
            return f"feature {target.feature} of {target.sae}"
        case Features():
            return f"{len(target.features)} features of {target.sae}"
        case Reconstruction():
            return f"with {target.sae}"
        case FileDirection():
            return f"the direction in {target.direction}"
        case Neuron():
            return f"neuron {target.neuron}"
        case Neurons():
            return f"{len(target.neurons)} neurons"
        case Head():
            return f"head {target.head}"


def strength_words(strength: Strength | None) -> str:
    """A strength in words; empty where there is none."""
    if strength is None:
        return ""
    unit = "" if strength.unit == "raw" else f" x {strength.unit}"
    return f", strength {strength.value:g}{unit}"
