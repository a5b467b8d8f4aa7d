"""The models and SAEs that a block-roles study is about: found, checked, loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analyses.benchmark import find_sae
from analyses.block_roles_measured import Config, Subject, Weights
from probe.errors import UserError
from probe.models import load_image_model
from probe.pipelines import is_pipeline, pipeline_folder
from probe.runs import Run, find_runs
from probe.sites import parse_site
from probe.toyturbo.making import READER, load_reader
from probe.toyturbo.reader import AttributeReader
from saes.recipe_saes import LoadedSae, common_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The SAEs of a study, in memory."""

    spec: str
    """Their model."""
    trained: Mapping[str, LoadedSae]
    """By block."""
    twins: Mapping[str, LoadedSae]
    """Of the random-weight twin, by block; may be fewer, or none."""
    sweep: Mapping[str, LoadedSae]
    """Others of the same blocks, by name."""

    def by_part(self) -> dict[str, Mapping[str, LoadedSae]]:
        """The SAEs by what they are for."""
        return {"saes": self.trained, "twins": self.twins, "sweep": self.sweep}

    def by_name(self) -> dict[str, LoadedSae]:
        """Those of the trained model by their folders' names, those of the sweep too."""
        return {one.run.path.name: one for one in [*self.trained.values(), *self.sweep.values()]}


def find_saes(config: Config, root: Path) -> Found:
    """The SAEs that the options name.

    Raises:
        UserError: there is none, or one is of another model, of no block's update, of the wrong
            weights, or of a block that another is of.
        Failure: one is still in training or damaged.
    """
    if not config.saes:
        raise UserError("no SAE was given; name one of each block's update with --saes.")
    runs = [find_sae(spec, root) for spec in config.saes]
    spec = runs[0].config["model"]["spec"]
    trained = by_block(runs, spec, twin=False)
    twins = by_block([find_sae(name, root) for name in config.twins], spec, twin=True)
    without = [block for block in twins if block not in trained]
    if without:
        raise UserError(
            f"the twin's SAE of {without[0]} has no partner: --saes has {', '.join(trained)}; give "
            "an SAE of that block too, or leave the twin's out."
        )
    seeds = {one.run.config["model"]["random_weights"] for one in twins.values()}
    if len(seeds) > 1:
        raise UserError(
            f"the SAEs of --twins are of twins of different seeds ({sorted(seeds)}); give those "
            "of one."
        )
    sweep = {run.path.name: loaded(run) for run in sweep_runs(config.sweep, root, spec, trained)}
    names = {one.run.path.name for one in trained.values()}
    return Found(
        spec=spec,
        trained=trained,
        twins=twins,
        sweep={name: one for name, one in sweep.items() if name not in names},
    )


def by_block(runs: Sequence[Run], spec: str, *, twin: bool) -> dict[str, LoadedSae]:
    """SAEs by the block that they are of. Raises `UserError` where one does not belong here."""
    found: dict[str, LoadedSae] = {}
    for run in runs:
        block = block_of(run, spec, twin=twin)
        if block in found:
            raise UserError(
                f"{found[block].run.path.name} and {run.path.name} are both of {block}; give one "
                "SAE a block, and others of the same block with --sweep."
            )
        found[block] = loaded(run)
    return found


def block_of(run: Run, spec: str, *, twin: bool) -> str:
    """The block whose update an SAE is of. Raises `UserError` where it does not belong here."""
    name, model, site = run.path.name, run.config["model"], parse_site(run.config["site"])
    if site.kind != "block" or site.tensor != "update":
        raise UserError(
            f"{name} is of {site}, and SAEs of blocks' updates were wanted (sites such as "
            "down.2.1); train one with `lorgnette train --site down.2.1`."
        )
    if model["spec"] != spec:
        raise UserError(
            f"{name} is of {model['spec']} and others of {spec}; give SAEs of one model."
        )
    random = model.get("random_weights")
    if twin and random is None:
        raise UserError(
            f"{name} is of the trained {spec}, not of its random-weight twin; give it with --saes."
        )
    if not twin and random is not None:
        raise UserError(
            f"{name} is of the random-weight twin of {spec} (seed {random}); give it with --twins."
        )
    return str(site)


def loaded(run: Run) -> LoadedSae:
    """An SAE in memory."""
    return LoadedSae.of(run)


def sweep_runs(
    names: Sequence[str], root: Path, spec: str, trained: Mapping[str, LoadedSae]
) -> list[Run]:
    """The SAEs that --sweep names. Of a folder of many those that fit are taken.

    Raises `UserError` where one that is named does not fit, or a folder has none that does.
    """
    runs: list[Run] = []
    for name in names:
        inside = [] if (Path(name) / "config.json").exists() else find_runs(Path(name), "sae")
        if not inside:
            run = find_sae(name, root)
            if block_of(run, spec, twin=False) not in trained:
                raise UserError(
                    f"{name} is of {run.config['site']}, of which --saes has none; give one of "
                    f"{', '.join(trained)}."
                )
            runs.append(run)
            continue
        fitting = [run for run in inside if _fits(run, spec, trained)]
        if not fitting:
            raise UserError(
                f"{name} holds no SAE of {', '.join(trained)} of {spec}; give another folder."
            )
        runs += fitting
    return runs


def _fits(run: Run, spec: str, trained: Mapping[str, LoadedSae]) -> bool:
    model = run.config.get("model", {})
    same = model.get("spec") == spec and model.get("random_weights") is None
    return run.complete and same and run.config.get("site") in trained


# ------------------------------------------------------------------------------------- in memory


def load_subjects(found: Found, device: str) -> dict[Weights, Subject]:
    """The model, and its twin where there are SAEs of it.

    Raises `UserError` where the model is not there or is no image model, or an SAE does not fit
    its block.
    """
    if not is_pipeline(found.spec):
        raise UserError(f"{found.spec} is no image model; give SAEs of an image model's blocks.")
    reader = world_reader(found.spec)
    subjects: dict[Weights, Subject] = {}
    weights: tuple[tuple[Weights, Mapping[str, LoadedSae]], ...] = (
        ("trained", found.trained), ("twin", found.twins)
    )  # fmt: skip
    for name, saes in weights:
        if not saes:
            continue
        seed = next(iter(saes.values())).run.config["model"]["random_weights"]
        model = load_image_model(
            found.spec, random_weights=seed, dtype=common_dtype(saes), device=device
        )
        order = [str(site) for site in model.sites()]
        for block, one in saes.items():
            model.block(parse_site(block))
            one.sae.to(model.device)
        ordered = {block: saes[block] for block in sorted(saes, key=order.index)}
        subjects[name] = Subject(weights=name, model=model, saes=ordered, reader=reader)
    return subjects


def world_reader(spec: str) -> AttributeReader | None:
    """What reads the factors off an image of toy-turbo; None for another model."""
    folder = Path(pipeline_folder(spec))
    return load_reader(folder) if (folder / READER).is_file() else None
