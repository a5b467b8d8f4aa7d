"""An SAE of a trained model beside that of the same model with random weights: which scores differ?

Three kinds of score are compared. The benchmark's (`analyses.benchmark`): what latents tell and
change. The headline numbers of feature pages (`saes.feature_reference`): how far a number of the
trained model's features is from the twin's. Complexity along lines between texts
(`analyses.simplicity.feature_paths`). Heap et al. 2025 (arXiv 2501.17727) find that scores of
automatic interpretation are much alike in both.
"""

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from analyses import benchmark
from analyses.benchmark_measured import Results
from analyses.cells import Frame, Tables
from analyses.simplicity.feature_paths import TOKENS, read_lines
from probe.corpora import BUILTIN, read_documents
from probe.errors import UserError
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.prompt_sets import Row
from probe.runs import Run
from saes.feature_queries import FeatureIndex
from saes.feature_reference import headline_numbers, told_apart
from saes.recipe_saes import LoadedSae

SHOWN = (
    "density", "max", "mean", "sd", "nearest_cosine", "decoder_norm", "encoder_decoder_cosine",
    "top_token_share", "top_jaccard",
)  # fmt: skip
"""Headline numbers that are compared; the others follow from these."""


def find_twins(sae: str, twin: str, root: Path) -> tuple[Run, Run]:
    """The two SAEs. Raises `UserError` where they are not of a model and its random-weight twin."""
    found = benchmark.find_sae(sae, root), benchmark.find_sae(twin, root)
    trained, control = (run.config["model"] | {"site": run.config["site"]} for run in found)
    if trained["random_weights"] is not None or control["random_weights"] is None:
        raise UserError(
            "--sae was to be of a trained model and --twin of the same with random weights "
            "(`lorgnette capture --random-weights SEED`); these are of "
            f"{_weights(trained)} and {_weights(control)}."
        )
    for name in ("spec", "site"):
        if trained[name] != control[name]:
            raise UserError(
                f"--sae is of {trained[name]} and --twin of {control[name]}; give SAEs of the same "
                "model and site."
            )
    return found


def _weights(described: dict) -> str:
    return "trained weights" if described["random_weights"] is None else "random weights"


# ------------------------------------------------------------------------------- the benchmark


def benchmark_scores(config: benchmark.Config, root: Path) -> Tables:
    """Every suite of the benchmark on both: table `scores`, a row a score with its difference, and
    `score_notes`, what could not be measured and why."""
    results = benchmark.measure(config, root)
    rows = [row for kind in _kinds(config, results) if (row := _compared(results, *kind))]
    return {"scores": pd.DataFrame(rows), "score_notes": pd.DataFrame({"note": results.notes})}


def _kinds(config: benchmark.Config, results: Results) -> list[tuple[str, str, str, str, str]]:
    """Title, suite, dictionary, setting and target of what is compared."""
    k, n, target = str(config.ks[0]), str(config.headline_n), results.headline_target
    return [
        (f"probing, {k} latent", "probing", "sae", k, ""),
        ("probing, the whole activation", "probing", "dense", "all", ""),
        (f"probe perturbation, {n} latents", "tpp", "sae", n, ""),
        (f"spurious correlation removed, {n} latents", "scr", "sae", n, target),
        ("absorption, as in the paper", "absorption", "sae", "paper", ""),
        ("absorption, as released", "absorption", "sae", "released", ""),
    ]


def _compared(
    results: Results, title: str, suite: str, name: str, setting: str, target: str
) -> dict | None:
    trained, twin = (
        results.find(suite, subject, name, setting, target) for subject in ("sae", "twin")
    )
    if trained is None or twin is None:
        return None
    difference = trained.minus(twin)
    return {
        "score": title, "trained": trained.estimate.value, "twin": twin.estimate.value,
        "difference": difference.value, "low": difference.low, "high": difference.high,
        "n": difference.n,
    }  # fmt: skip


# ---------------------------------------------------------------------------- headline numbers


def headline_scores(sae: FeatureIndex, twin: FeatureIndex, seed: int) -> Tables:
    """How well each headline number of a feature tells a trained model's from a twin's: table
    `headlines`, a row a number with its AUROC (.5: not at all)."""
    numbers: list[Frame] = [headline_numbers(index) for index in (sae, twin)]
    rows = [
        {"number": name, "trained": float(numbers[0][name].median()),
         "twin": float(numbers[1][name].median())} | asdict(told)
        for name, told in told_apart(sae, twin, seed=seed).items() if name in SHOWN
    ]  # fmt: skip
    return {"headlines": pd.DataFrame(rows)}


# -------------------------------------------------------------------------------------- lines


def line_scores(sae: Run, twin: Run, n: int, *, seed: int) -> Tables:
    """Complexity of features along `n` lines between texts in both models: table `lines`."""
    tables = []
    for weights, run in (("trained", sae), ("twin", twin)):
        described = run.config["model"]
        model = load_language_model(
            described["spec"], dtype=described["dtype"], random_weights=described["random_weights"]
        )
        lines = text_pairs(model, n)
        found = read_lines(model, LoadedSae.of(run), lines, seed=seed)
        tables.append(found.assign(weights=weights))
    return {"lines": pd.concat(tables)}


def text_pairs(model: LanguageModel, n: int) -> list[tuple[Row, Row]]:
    """Beginnings of 2n texts of the built-in corpus, two and two."""
    rows: list[Row] = []
    for document in read_documents(BUILTIN):
        ids = tuple(model.tokenizer(document.text)["input_ids"][:TOKENS])
        if len(ids) == TOKENS:
            rows.append(ids)
        if len(rows) == 2 * n:
            break
    return list(zip(rows[::2], rows[1::2], strict=True))
