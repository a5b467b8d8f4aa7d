"""Dose and response: what a recipe does at which strength, what it costs, beside its controls.

A steering vector that moves a model at all moves it in many ways, and a random vector of the same
length moves it too. So every recipe (`saes.recipes`) is measured at several multiples of its own
strengths, and beside changes of the same size, at the same tokens, in random directions, along
random features, and along the feature of the same number of the random-weight twin. What is
measured, and how, stands in `analyses.dose_measured`.

Asked of each recipe, at its own strength: does it do what it is meant to more than each kind of
control (wanted tokens; its feature on the text that the model then writes)? Is the damage on
neutral text larger than that of random directions of the same size? And does the effect grow with
the strength?
"""

from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from analyses.dose_cells import measured_once
from analyses.dose_findings import figures, numbers, tables, text, verdicts
from analyses.dose_measured import Config, Measured
from analyses.report import Report
from probe.directions import load_direction
from probe.errors import UserError
from probe.runs import Run, find_runs
from saes.recipe_saes import LoadedSae, find_sae, sae_reference
from saes.recipes import read_recipe, to_json
from saes.steering import prepare

__all__ = ["Config", "estimate", "figures", "measure", "run"]


def estimate(config: Config) -> dict[str, str]:
    """What the study would do."""
    check(config)
    candidates = len(config.times) * (2 + 2 * config.controls)
    n_recipes = len(config.recipes)
    tokens = config.written * config.new_tokens + config.sequences * 128 + config.prompts * 14
    return {
        "recipes": ", ".join(config.recipes),
        "candidates": f"{candidates} for each recipe: {len(config.times)} strengths of the recipe, "
        f"{config.controls} random directions, {config.controls} random features, the twin",
        "measured on": f"{config.prompts} openings, {config.written} texts of {config.new_tokens} "
        f"tokens, {config.sequences} sequences of neutral text",
        "kept in": "tasks/ below the root, a folder for each recipe; what is there is not done "
        "again",
        "time": f"about {max(1, round(n_recipes * candidates * tokens / 60_000))} min for "
        "SmolLM2 on two cores",
    }


def check(config: Config) -> None:
    """Raise `UserError` where the options do not make a study."""
    if not config.recipes:
        raise UserError("no recipe was given; name files with --recipes.")
    if not config.times or 1.0 not in config.times:
        raise UserError("--times must hold 1, the recipe's own strength; add it.")
    least = min(config.prompts, config.written, config.new_tokens, config.sequences)
    if least < 1 or config.controls < 2:
        raise UserError(
            "prompts, written, new_tokens and sequences must be 1 or more, controls 2 or more; got "
            f"{config.prompts}, {config.written}, {config.new_tokens}, {config.sequences} and "
            f"{config.controls}."
        )


def measure(config: Config, root: Path) -> Measured:
    """Measure every recipe that is not measured yet.

    Raises:
        UserError: a recipe, SAE or direction is not there or does not fit.
        Failure: logits are not finite.
    """
    check(config)
    probe = load_direction(Path(config.probe)) if config.probe else None
    twin = find_twin(config.twin, root) if config.twin else None
    measured, model = [], None
    with tqdm(config.recipes, desc="dose-response", unit="recipe") as bar:
        for path in bar:
            recipe = read_recipe(Path(path))
            same = model is not None and model.spec == recipe.model.spec
            steering = prepare(
                recipe, root=root, model=model if same else None, device=config.device
            )
            model = steering.model

            def say(what: str, name: str = recipe.name) -> None:
                bar.set_postfix_str(f"{name}: {what}")

            measured.append(measured_once(steering, config, root, twin=twin, probe=probe, say=say))
    return Measured(config=config, recipes=tuple(measured))


def find_twin(name: str, root: Path) -> LoadedSae:
    """The SAE of that folder or name. Raises `UserError` where there is none that is complete."""
    runs = [run for run in find_runs(root, "sae") if run.complete]
    for run in runs:
        if name in (run.path.name, str(run.path)) or run.path.resolve() == Path(name).resolve():
            return find_sae(sae_reference(run), root)
    there = ", ".join(run.path.name for run in runs) or "none yet"
    raise UserError(f"there is no complete SAE {name!r} below {root}; there are: {there}.")


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run."""
    check(config)
    recipes = [read_recipe(Path(path)) for path in config.recipes]
    asked = asdict(config) | {
        "recipes": [to_json(recipe) for recipe in recipes], "times": list(config.times),
        "twin": Path(config.twin).name, "kind": "report", "schema": 1, "study": "dose-response",
    }  # fmt: skip
    del asked["device"]
    folder = Run.create(root / "reports" / "dose-response", Path(recipes[0].model.spec).name, asked)
    with folder.lock():
        if not folder.complete:
            report = make_report(measure(config, root))
            report.write(folder, inputs={}, seeds={"controls": config.seed})
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title="Dose and response of recipes",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
