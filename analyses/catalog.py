"""The studies there are, as rows of data; the command line and the dashboard go through them.

A study is a module of `analyses` that offers

    Config                                  a frozen dataclass, every field with a docstring: the
                                            options of `lorgnette analyse NAME`; the class's own
                                            docstring says what the study asks and gives an example
    estimate(config) -> dict[str, str]      what it would do and for how long, a few named lines;
                                            reads and writes nothing large
    measure(config, root) -> M              the work: numbers, no figures. It keeps what it has
                                            measured below `root`, so that a study that was stopped
                                            goes on where it was
    figures(measured: M) -> dict[str, Figure]   the figures by name, in the report's order
    run(config, root) -> Run                measures, writes the report to
                                            `root/reports/<name>/<name of its own>-<hash8>/` and
                                            gives its run; finds the report again where it is there

M is the study's own frozen dataclass. Trouble is `probe.errors.UserError` or `Failure`. This module
imports none of them: a study is loaded when it is asked for.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import plotly.graph_objects as go

from probe.errors import UserError
from probe.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A row of the catalog."""

    name: str
    """What `lorgnette analyse` calls it; its reports are in the folder of that name."""
    module: str
    """The module that holds it."""
    line: str
    """What it asks, in one line."""


@runtime_checkable
class StudyModule(Protocol):
    """What a study's module offers; see above."""

    @property
    def Config(self) -> type[Any]:
        """Its options."""
        ...

    def estimate(self, config: Any) -> dict[str, str]:
        """What it would do."""
        ...

    def measure(self, config: Any, root: Path) -> Any:
        """The work."""
        ...

    def figures(self, measured: Any) -> dict[str, go.Figure]:
        """Its figures."""
        ...

    def run(self, config: Any, root: Path) -> Run:
        """The work and its report."""
        ...


STUDIES = (
    Study(
        name="top-afa",
        module="analyses.top_afa",
        line="TopK, BatchTopK and top-AFA at neighbouring layers: fidelity at matched L0",
    ),
    Study(
        name="ksparse",
        module="analyses.ksparse",
        line="the k-sparse autoencoder of 2013 on images: k, annealing, alpha, linear probes",
    ),
    Study(
        name="benchmark",
        module="analyses.benchmark",
        line="what an SAE is good for: probing, perturbation, absorption, matching, coherence",
    ),
    Study(
        name="dose-response",
        module="analyses.dose_response",
        line="what a steering recipe does at which strength, and its cost, beside its controls",
    ),
    Study(
        name="directions",
        module="analyses.directions",
        line="one direction for a difference between prompts: separates, necessary, sufficient?",
    ),
    Study(
        name="block-roles",
        module="analyses.block_roles",
        line="what each block of an image model does: predicts, causes, stands for; transport",
    ),
    Study(
        name="collapse",
        module="analyses.collapse.study",
        line="n and n + 1 repetitions: do they become the same, which tokens reach the last one?",
    ),
    Study(
        name="circuit-breakers",
        module="analyses.circuit_breakers.study",
        line="break a concept by rerouting its states: attacks, cost, states, probes, features",
    ),
    Study(
        name="simplicity-bias",
        module="analyses.simplicity.study",
        line="random weights: how complex are their functions, and does it decide what is learnt?",
    ),
    Study(
        name="geometry",
        module="analyses.geometry",
        line="the shape of activation stores: rank, anisotropy, collisions, CKA of sites",
    ),
)
"""Every study there is, in the order in which they are listed."""


def find_study(name: str) -> Study:
    """The study of that name. Raises `UserError` where there is none."""
    for study in STUDIES:
        if study.name == name:
            return study
    names = ", ".join(study.name for study in STUDIES)
    raise UserError(f"{name!r} is no study; wanted one of {names}.")


def load_study(name: str) -> StudyModule:
    """The module of the study of that name. Raises `UserError` where there is none."""
    return cast(StudyModule, importlib.import_module(find_study(name).module))
