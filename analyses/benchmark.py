"""What an SAE is good for, beyond reconstruction: six suites beside their controls.

1. probing: k-sparse probing of texts' classes (`saes.probing`)
2. tpp: targeted probe perturbation (`saes.perturbation`)
3. scr: spurious-correlation removal (`saes.perturbation`)
4. absorption: first-letter absorption (`saes.absorption`)
5. matching: the SAE's latents matched with those of another (`saes.matching`)
6. coherence: how alike its latents' directions are (`saes.matching`)

The first four follow SAEBench (Karvonen et al. 2025, 2503.09532) at the size of a laptop: labelled
texts of the built-in corpus or of the user, and the words of the model's vocabulary, captured once
per model and site (`saes.tasks`). An SAE trained on the random-weight twin of the model goes
through the same suites on its own activations (Heap et al. 2025, 2501.17727, found twins hard to
tell apart by such scores).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from analyses.benchmark_figures import figures
from analyses.benchmark_findings import estimates_table, key_figures, tables, text, verdicts
from analyses.benchmark_measured import (
    TEXT_SUITES,
    Config,
    Results,
    Subject,
    resample_weights,
)
from analyses.benchmark_suites import (
    absorption_suite,
    coherence_suite,
    matching_suite,
    probing_suite,
    scr_suite,
    text_codes,
    tpp_suite,
)
from analyses.report import Report
from probe.corpora import corpus_checksum
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.models import Dtype, load_language_model
from probe.runs import Run, atomic_path, find_runs, sha256_file
from probe.sites import parse_site
from saes.folder import WEIGHTS, load_sae
from saes.labelled_texts import FIRST_LETTER, two_groups
from saes.tasks import TaskConfig, TaskData, load_task, task_name, write_task

__all__ = ["Config", "estimate", "figures", "measure", "run"]

logger = logging.getLogger(__name__)

WORD_TEST_SHARE = 0.2
"""Share of the words that test. SAEBench: the same."""
MIN_WORDS_PER_LETTER = 50
"""Letters of fewer words in the vocabulary are left out."""
ESTIMATES = "estimates.parquet"
"""Every number with its interval, a row each."""

Load = Callable[[str, Dtype, int | None], LanguageModel]


def estimate(config: Config) -> dict[str, str]:
    """What would be done, and for how long."""
    specs = named(config)
    texts = f"{config.dataset}, {config.context} tokens of each text"
    return {
        "SAEs": ", ".join(specs.values()) or "none named yet",
        "suites": ", ".join(config.suites),
        "texts": texts if TEXT_SUITES & set(config.suites) else "none",
        "kept in": "tasks/ below the root: the texts' activations, for other SAEs of the same site "
        f"too; about {0.35 * len(specs):.2g} GB for SmolLM2 and the built-in corpus",
        "time": f"about {5 * len(specs)} minutes on one core for SmolLM2 and the built-in corpus",
    }


def named(config: Config) -> dict[str, str]:
    """The SAEs that the config names, by their part in it."""
    specs = {"sae": config.sae, "compare": config.compare, "twin": config.twin}
    return {name: spec for name, spec in specs.items() if spec}


# ------------------------------------------------------------------------------ measuring


def measure(config: Config, root: Path) -> Results:
    """Measure everything the config asks for; captures are kept in `<root>/tasks`.

    Raises:
        UserError: an SAE, the texts or a column is not there, or nothing could be measured.
        Failure: a file is damaged or a number is not finite.
    """
    subjects = find_subjects(config, root)
    results = Results()
    load = _model_loader(config.device)
    for subject in subjects:
        if TEXT_SUITES & set(config.suites):
            _measure_texts(config, root, subject, load, results)
        if "absorption" in config.suites:
            with _noted(results, f"absorption of {subject.label}"):
                _measure_words(config, root, subject, load, results)
    if "matching" in config.suites:
        with _noted(results, "matching"):
            if len(subjects) < 2:
                raise UserError("there is no second SAE; name one with compare or twin.")
            results.tables["matching"], cosines = matching_suite(subjects, config.seed)
            results.matched.update(cosines)
    if "coherence" in config.suites:
        results.tables["coherence"], cosines = coherence_suite(subjects, config.seed)
        results.nearest.update(cosines)
    if not results.estimates and not results.tables:
        raise UserError(f"nothing could be measured. {' '.join(results.notes)}")
    return results


def find_subjects(config: Config, root: Path) -> list[Subject]:
    """The SAE, and the others that the config names. Raises as `find_sae` does."""
    runs = find_saes(config, root)
    labels = {"sae": "SAE latents", "compare": "compared SAE", "twin": "SAE of the twin"}
    places = dict.fromkeys(runs, "") | {"twin": " of the twin"}
    if other := runs.get("compare"):
        site, own = other.config["site"], runs["sae"].config
        same = site == own["site"] and other.config["model"] == own["model"]
        places["compare"] = "" if same else f", {site}"
    return [
        Subject(name=name, label=labels[name], run=run, sae=load_sae(run.path), place=places[name])
        for name, run in runs.items()
    ]


def find_saes(config: Config, root: Path) -> dict[str, Run]:
    """The runs of the SAEs that the config names. Raises as `find_sae` does."""
    specs = {"sae": config.sae} | named(config)
    return {name: find_sae(spec, root) for name, spec in specs.items()}


def find_sae(spec: str, root: Path) -> Run:
    """A complete SAE by its folder or its name below `<root>/saes`.

    Raises `UserError` where there is none, `Failure` where it is still in training.
    """
    path = Path(spec) if spec and Path(spec).is_dir() else root / "saes" / spec
    if not spec or not path.is_dir():
        there = ", ".join(run.path.name for run in find_runs(root, "sae")) or "none yet"
        raise UserError(
            f"{spec or 'nothing'} was named where the folder of an SAE was wanted; below {root} "
            f"there are: {there}."
        )
    run = Run.open(path)
    if run.kind != "sae" or not {"model", "site"} <= set(run.config):
        raise UserError(
            f"{path} is a run of kind {run.kind!r} where an SAE with its model and site was "
            "wanted; give a folder that `lorgnette train` wrote."
        )
    if not run.complete:
        raise Failure(f"{path} is still in training; run `lorgnette train` again first.")
    return run


def find_stream_saes(specs: Sequence[str], model: str, root: Path) -> dict[str, Run]:
    """SAEs of a model's residual stream, by folder name.

    Raises `UserError` where one is of another model, of random weights, or of another site; else as
    `find_sae` does.
    """
    found = {}
    for spec in specs:
        run = find_sae(spec, root)
        described, site = run.config["model"], parse_site(run.config["site"])
        if (described["spec"], described.get("random_weights")) != (model, None):
            raise UserError(
                f"{run.path.name} is an SAE of {described['spec']}"
                + ("" if described.get("random_weights") is None else " with random weights")
                + f" and the study is about {model}; name SAEs of that model."
            )
        if site.kind not in ("resid_pre", "resid_post"):
            raise UserError(
                f"{run.path.name} reads {site}; name SAEs of the residual stream "
                "(resid_pre.L or resid_post.L)."
            )
        found[run.path.name] = run
    return found


@contextlib.contextmanager
def _noted(results: Results, what: str) -> Iterator[None]:
    """Go on without a suite that these texts or this model have no use for, and say so."""
    try:
        yield
    except UserError as error:
        logger.info("%s is left out: %s", what, error)
        results.notes.append(f"{what} is left out: {error}")


def _model_loader(device: str) -> Load:
    """Loads each model once, and only where something has to be captured."""

    @cache
    def load(spec: str, dtype: Dtype, random_weights: int | None) -> LanguageModel:
        logger.info("loading %s", spec)
        return load_language_model(spec, dtype=dtype, device=device, random_weights=random_weights)

    return load


def _captured(task: TaskConfig, root: Path, load: Load) -> TaskData:
    run = Run.create(root / "tasks", task_name(task), task.run_config())
    if run.complete:
        return load_task(run)
    model = load(task.model["spec"], task.model["dtype"], task.model["random_weights"])
    return write_task(run, task, model)


def _measure_texts(
    config: Config, root: Path, subject: Subject, load: Load, results: Results
) -> None:
    """The suites on labelled texts."""
    label, attribute = config.columns
    task = TaskConfig(
        model=subject.run.config["model"],
        site=subject.run.config["site"],
        source=config.dataset,
        label=label,
        attribute=attribute,
        pool=config.pool,
        context=config.context,
        max_per_class=config.max_per_class,
        seed=config.seed,
    )
    data = _captured(task, root, load)
    results.counts.update({"texts": data.n_texts, "test_texts": int(data.test.sum())})
    codes = text_codes(subject, data, config.seed)
    weights = resample_weights(data, config.n_resamples, config.seed)
    if "probing" in config.suites:
        found, table = probing_suite(subject, data, codes, config.ks, weights, config.seed)
        results.estimates.extend(found)
        if subject.name == "sae":
            results.tables["classes"] = table
    if "tpp" in config.suites:
        with _noted(results, "tpp"):
            found = tpp_suite(subject, data, codes, config.ns, weights, config.seed)
            results.estimates.extend(found)
    if "scr" in config.suites:
        with _noted(results, "scr"):
            if attribute is None:
                raise UserError("it needs a second column; name an attribute.")
            groups = (
                two_groups(data.labels, config.dataset, label),
                two_groups(data.attributes, config.dataset, attribute),
            )
            suite = scr_suite(subject, data, codes, groups, config.ns, weights, config.seed)
            results.estimates.extend(suite[0])
            results.add_rows("spurious_probes", suite[1])
            results.notes.extend(suite[2])


def _measure_words(
    config: Config, root: Path, subject: Subject, load: Load, results: Results
) -> None:
    """Absorption on the words of the model's vocabulary."""
    task = TaskConfig(
        model=subject.run.config["model"],
        site=subject.run.config["site"],
        source=FIRST_LETTER,
        label="first letter",
        attribute=None,
        pool="last",
        max_per_class=max(config.words_per_letter, MIN_WORDS_PER_LETTER),
        min_per_class=MIN_WORDS_PER_LETTER,
        test_share=WORD_TEST_SHARE,
        batch_texts=64,
        seed=config.seed,
    )
    words = _captured(task, root, load)
    results.counts.update({"words": words.n_texts, "test_words": int(words.test.sum())})
    weights = resample_weights(words, config.n_resamples, config.seed)
    found, table, notes = absorption_suite(subject, words, weights, config.seed)
    results.estimates.extend(found)
    results.notes.extend(notes)
    if subject.name == "sae" and len(table):
        results.tables["letters"] = table


# ------------------------------------------------------------------------------ reporting


def run(config: Config, root: Path) -> Run:
    """Measure and write the report, or find it written; gives its folder.

    Raises as `measure` does.
    """
    saes = find_saes(config, root)
    check_reads_text(config, saes)
    hashes = {name: sha256_file(each.path / WEIGHTS) for name, each in saes.items()}
    described = describe(config) | hashes
    folder = Run.create(root / "reports" / "benchmark", saes["sae"].path.name, described)
    if not folder.complete:
        with folder.lock():
            results = measure(config, root)
            with atomic_path(folder.path / ESTIMATES) as temporary:
                estimates_table(results).to_parquet(temporary, index=False)
            report = make_report(config, saes, results)
            report.write(folder, inputs=hashes, seeds={"seed": config.seed})
    return folder


def check_reads_text(config: Config, saes: Mapping[str, Run]) -> None:
    """Raise `UserError` where a suite is of text and an SAE is of an image model."""
    asked = [name for name in config.suites if name in (*TEXT_SUITES, "absorption")]
    of_images = [run.path.name for run in saes.values() if parse_site(run.config["site"]).of_images]
    if asked and of_images:
        raise UserError(
            f"{of_images[0]} is of an image model and {', '.join(asked)} are suites of text; ask "
            "for --suites matching coherence."
        )


def describe(config: Config) -> dict[str, Any]:
    """The report's `config.json`, but for its SAEs: texts by name and checksum, wherever they are,
    and nothing that changes no number.
    """
    asked: dict[str, Any] = asdict(config) | {"dataset": Path(config.dataset).name}
    for name in ("sae", "compare", "twin", "device"):
        del asked[name]
    asked["label"], asked["attribute"] = config.columns
    texts = corpus_checksum(config.dataset) if TEXT_SUITES & set(config.suites) else None
    return {"kind": "report", "schema": 1, "study": "benchmark", "texts": texts} | asked


def make_report(config: Config, saes: Mapping[str, Run], results: Results) -> Report:
    """What the benchmark found."""
    return Report(
        title=f"Benchmark of {saes['sae'].path.name}",
        text=text(config, saes, results),
        verdicts=verdicts(config, results),
        numbers=key_figures(config, results),
        tables=tables(results),
        figures=figures(results),
    )
