"""What does each block of an image model do?

Surkov et al. 2024 (arXiv 2410.22366) look at the features of four blocks of SDXL-Turbo and find
composition in down.2.1, local detail in up.0.0, colour, texture and style in up.0.1. Here the same
is asked of a model whose every factor is known, toy-turbo, by measurement:

1. what a block's features predict (`analyses.block_roles_probes`),
2. what swapping or removing its update changes in the image (`analyses.block_roles_causes`),
3. whether its features act where they fire (`analyses.block_roles_locality`) and bring about what
   they stand for (`analyses.block_roles_pushes`),
4. what their top images have in common (`analyses.block_roles_scores`),
5. which true values have a feature of their own (`analyses.block_roles_probes`),
6. what k and width trade, and whether SAEs of one step serve four (`analyses.block_roles_sweep`),
7. whether transport of features beats steering and neurons (`analyses.block_roles_transport`),

beside the random-weight twin, shuffled labels, random features and random directions. What it finds
is about toy-turbo, whose blocks were opened one after another in training. On any other model the
parts that need known factors are left out.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from analyses import (
    block_roles_causes,
    block_roles_locality,
    block_roles_pushes,
    block_roles_sweep,
    block_roles_transport,
)
from analyses.block_roles_cells import checksums, described, kept
from analyses.block_roles_clip import ImageText, clip_scores, load_image_text
from analyses.block_roles_drawing import Ticks, pixels
from analyses.block_roles_figures import figures
from analyses.block_roles_findings import numbers, verdicts
from analyses.block_roles_images import Looked, look
from analyses.block_roles_measured import Config, Measured, Settings, Subject, Tables, settle
from analyses.block_roles_probes import probe
from analyses.block_roles_scores import scores
from analyses.block_roles_subjects import Found, find_saes, load_subjects
from analyses.block_roles_tables import tables
from analyses.block_roles_text import text
from analyses.report import Report
from probe.models import model_name
from probe.runs import Run
from probe.toyturbo.evaluation import read, shares
from probe.toyturbo.world import FACTORS

__all__ = ["Config", "estimate", "figures", "measure", "run"]

logger = logging.getLogger(__name__)

SECONDS_AN_IMAGE = 0.03
"""Of toy-turbo on one core, many together."""
BEST_IN_STEPS = {"quick": 3, "full": 6}
"""Features of each block that are pushed in four steps."""
OF_BLOCK, OF_STUDY = "block", "study"


# ------------------------------------------------------------------------------- what it would do


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    settings = settle(config)
    drawn = images_drawn(config, settings)
    total = sum(drawn.values())
    return {
        "SAEs": ", ".join(config.saes) or "none named yet",
        "twins": ", ".join(config.twins) or "none: that control is left out",
        "images drawn": f"{total}: " + ", ".join(f"{n} for {what}" for what, n in drawn.items()),
        "kept in": "tasks/ below the root, a folder a part; what is there is not done again",
        "time": f"about {max(1, round(total * SECONDS_AN_IMAGE / 60) + 1)} min for toy-turbo on "
        "two cores",
    }


def images_drawn(config: Config, settings: Settings) -> dict[str, int]:
    """How many images each part draws, of a model whose factors are known; four steps count as
    four."""
    blocks, models = len(config.saes), 1 + bool(config.twins)
    in_steps = BEST_IN_STEPS[config.preset] * settings.per_feature
    whens = len(block_roles_pushes.WHENS)
    return {
        "probes and scores": models * settings.images,
        "patches and ablations": models * block_roles_causes.n_images(settings, blocks),
        "locality": (blocks + len(config.twins)) * block_roles_locality.n_images(settings),
        "pushes of features": blocks * block_roles_pushes.n_images(settings),
        "k and width": settings.images,
        "four steps": 5 * block_roles_sweep.in_steps(settings)
        + blocks * in_steps * 3 * (1 + 4 * (whens - 1)),
        "transport": len(FACTORS) * 3 * block_roles_transport.n_images(settings),
    }


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, root: Path) -> Measured:
    """Measure every part that is not measured yet.

    Raises:
        UserError: an SAE is not there, or is not one of a block's update, of this model or of the
            twin; the prompts or the image-text model are not there.
        Failure: a file is damaged.
    """
    settings = settle(config)
    found = find_saes(config, root)
    judge = load_image_text(config.clip) if config.clip else None
    study = _Study(config, settings, root, found, judge)
    with tqdm(total=study.n_parts, desc="block-roles", unit="part") as bar:
        study.bar = bar
        study.all()
    trained = study.subjects["trained"]
    fidelity = study.tables.pop("fidelity", [])
    return Measured(
        config=config,
        settings=settings,
        model=model_name(trained.model.spec),
        blocks=tuple(trained.blocks),
        twins=tuple(study.subjects["twin"].blocks) if "twin" in study.subjects else (),
        known=trained.reader is not None,
        fidelity=dict(fidelity[0][["factor", "share"]].to_numpy()) if fidelity else {},
        tables={
            name: pd.concat(frames, ignore_index=True) for name, frames in study.tables.items()
        },
        notes=tuple(study.notes),
    )


class _Study:
    """The parts, one after another."""

    def __init__(
        self, config: Config, settings: Settings, root: Path, found: Found, judge: ImageText | None
    ) -> None:
        self.config, self.settings, self.root = config, settings, root
        self.found, self.judge = found, judge
        self.subjects = load_subjects(found, config.device)
        self.known = self.subjects["trained"].reader is not None
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.notes: list[str] = []
        self.bar: Any = None

    @property
    def n_parts(self) -> int:
        """How many parts there are."""
        blocks = sum(len(subject.blocks) for subject in self.subjects.values())
        trained = len(self.subjects["trained"].blocks)
        if not self.known:
            return 2 * len(self.subjects) + (2 + (self.judge is not None)) * blocks + 2
        of_clip = blocks * (self.judge is not None)
        return 3 * len(self.subjects) + 3 * blocks + of_clip + 2 * trained + 2 + len(FACTORS)

    def all(self) -> None:
        """Measure everything."""
        trained = self.subjects["trained"]
        looked = {}
        for weights, subject in self.subjects.items():
            looked[weights] = self._look(subject)
            self._of_subject(subject, looked[weights])
        every = self.found.by_name()
        args = (self.config, self.settings, self.root)
        self._part("k and width", lambda t: block_roles_sweep.widths(trained, every, *args, t))
        self._part("four steps", lambda t: block_roles_sweep.steps(trained, *args, t))
        if self.known:
            self._of_features(trained, looked["trained"])

    def _look(self, subject: Subject) -> Looked:
        found: list[Looked] = []

        def make(tick: Ticks) -> Tables:
            found.append(look(subject, self.config, self.settings, self.root, tick))
            return {}

        self._part(f"images, {subject.weights}", make)
        return found[0]

    def _of_subject(self, subject: Subject, looked: Looked) -> None:
        """What is measured of the model and of its twin."""
        config, settings, root, who = self.config, self.settings, self.root, subject.weights
        if self.known:
            self._part(f"fidelity, {who}", lambda _: fidelity(subject, looked, config, root))
        self._part(
            f"patches, {who}",
            lambda t: block_roles_causes.causes(subject, looked, config, settings, root, t),
        )
        for block in subject.blocks:
            where = f"{block}, {who}"
            if self.known:
                self._part(
                    f"probes, {where}",
                    lambda _, b=block: probe(subject, b, looked, config, root),
                )
            self._part(
                f"locality, {where}",
                lambda t, b=block: block_roles_locality.locality(
                    subject, b, looked, config, settings, root, t
                ),
            )
            self._part(
                f"scores, {where}",
                lambda _, b=block: scores(subject, b, looked, config, settings, root),
            )
            if (judge := self.judge) is not None:
                self._part(
                    f"scores by CLIP, {where}",
                    lambda t, b=block, j=judge: clip_scores(
                        subject, b, looked, j, config, settings, root, t
                    ),
                )

    def _of_features(self, subject: Subject, looked: Looked) -> None:
        """What its features do, which is asked of the trained model alone."""
        args = (self.config, self.settings, self.root)
        values = pd.concat(self.tables["values"], ignore_index=True)
        for block in subject.blocks:
            wanted = block_roles_pushes.pushes_of(values, block)
            few = wanted[: BEST_IN_STEPS[self.config.preset]]
            self._part(
                f"pushes, {block}",
                lambda t, b=block, w=wanted: block_roles_pushes.pushes(
                    subject, b, looked, w, *args, t
                ),
            )
            self._part(
                f"pushes in steps, {block}",
                lambda t, b=block, w=few: block_roles_pushes.pushes_in_steps(
                    subject, b, looked, w, *args, t
                ),
            )
        for factor in FACTORS:
            self._part(
                f"transport, {factor}",
                lambda t, f=factor: block_roles_transport.transports(subject, f, looked, *args, t),
            )

    def _part(self, name: str, make: Callable[[Ticks], Tables]) -> None:
        """Measure a part, or read it where it is kept, and say how it goes."""
        drawn = 0

        def tick(n: int) -> None:
            nonlocal drawn
            drawn += n
            self.bar.set_postfix_str(f"{name}: {drawn} images")

        self.bar.set_postfix_str(name)
        for table, rows in make(tick).items():
            if len(rows):
                self.tables.setdefault(table, []).append(rows)
        self.bar.update()


def fidelity(subject: Subject, looked: Looked, config: Config, root: Path) -> Tables:
    """Share of each factor's values that are drawn as the captions say: table `fidelity`."""
    reader, truth = subject.reader, looked.truth
    assert reader is not None and truth is not None, "factors are known"
    if subject.weights == "twin":
        return {}
    asked = described("fidelity", subject) | {
        "saes": [], "images": len(looked), "seed": config.seed
    }  # fmt: skip

    def make() -> Tables:
        seen = read(reader, pixels(looked.images(torch.arange(len(looked)))))
        found = shares(seen, truth)
        return {"fidelity": pd.DataFrame({"factor": list(found), "share": list(found.values())})}

    return kept(root, asked, make)


# ------------------------------------------------------------------------------------- reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it; gives its run. Raises as `measure` does."""
    settings = settle(config)
    found = find_saes(config, root)
    hashes = {name: checksums(saes) for name, saes in found.by_part().items()}
    asked = {
        "kind": "report", "schema": 1, "study": "block-roles", "preset": config.preset,
        "prompts": config.prompts, "clip": Path(config.clip).name, "seed": config.seed,
    } | asdict(settings) | hashes  # fmt: skip
    folder = Run.create(root / "reports" / "block-roles", model_name(found.spec), asked)
    with folder.lock():
        if not folder.complete:
            report = make_report(measure(config, root))
            inputs = {
                f"{part}/{key}": value for part, of in hashes.items() for key, value in of.items()
            }
            report.write(folder, inputs=inputs, seeds={"seed": config.seed})
    return folder


def make_report(measured: Measured) -> Report:
    """What was found."""
    return Report(
        title=f"What the blocks of {measured.model} do",
        text=text(measured),
        verdicts=tuple(verdicts(measured)),
        numbers=numbers(measured),
        tables=tables(measured),
        figures=figures(measured),
    )
