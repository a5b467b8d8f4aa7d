"""The suites of the benchmark: each measures one SAE beside its controls, with resamples."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from analyses.benchmark_measured import Measured, Subject
from saes.absorption import (
    PAPER,
    RELEASED,
    AbsorptionConfig,
    Letter,
    LetterAbsorption,
    find_letters,
    mean_absorption,
    measure_absorption,
    shuffled,
)
from saes.dictionaries import (
    PooledCodes,
    channel_dictionary,
    pca_dictionary,
    pool_codes,
    probe_dictionary,
    random_dictionary,
    sae_dictionary,
)
from saes.labelled_texts import Groups
from saes.matching import coherence, match_decoders, random_directions
from saes.metrics import interval
from saes.perturbation import (
    Perturbation,
    fit_spurious,
    make_spurious,
    measure_scr,
    measure_tpp,
    scr_scores,
    tpp_scores,
)
from saes.probing import (
    LinearProbe,
    SparseProbe,
    binary_tasks,
    dense_probes,
    k_sparse_probes,
    mean_accuracy,
)
from saes.tasks import TaskData

logger = logging.getLogger(__name__)

MIN_PROBE_F1, MIN_WORDS = 0.6, 10
"""Letters whose probe is worse, or which have fewer recognised test words, are left out of the
mean. SAEBench: .6 and 20."""
THRESHOLDS = {"paper": PAPER, "released": RELEASED}
"""Both of SAEBench's rules for what counts as absorbing."""


def text_codes(subject: Subject, data: TaskData, seed: int) -> list[PooledCodes]:
    """Codes of all texts: the SAE's, and those of its controls where it is the main one."""
    logger.info("encoding %d rows with %s", len(data.rows), subject.label)
    found = [pool_codes(sae_dictionary(subject.sae, label=subject.label), data)]
    if subject.name == "sae":
        k = max(1, round(found[0].l0))
        rivals = (
            channel_dictionary(data),
            pca_dictionary(data),
            random_dictionary(data, subject.sae.config.d_sae, k, seed),
        )
        found += [pool_codes(rival, data) for rival in rivals]
    return found


# ---------------------------------------------------------------------- k-sparse probing


def probing_suite(
    subject: Subject,
    data: TaskData,
    codes: Sequence[PooledCodes],
    ks: Sequence[int],
    weights: Float64[Tensor, "r n"],
    seed: int,
) -> tuple[list[Measured], pd.DataFrame]:
    """Mean accuracy by dictionary and k, and the SAE's best latents for every class."""
    tasks = binary_tasks(data, seed)
    labels = {pooled.dictionary.name: pooled.dictionary.label for pooled in codes}
    probes = [probe for pooled in codes for probe in k_sparse_probes(pooled, tasks, ks)]
    if not subject.repeats:
        probes += dense_probes(data.pooled().double().numpy(), tasks)[0]
    labels["dense"] = f"whole activation{subject.place}"
    if subject.name == "sae":
        probes += k_sparse_probes(codes[0], tasks, ks, shuffle=seed)
        labels["shuffled"] = "SAE latents, shuffled labels"
    estimates = [
        Measured(
            suite="probing",
            subject=subject.name,
            name=name,
            label=labels[name],
            setting="all" if k == 0 else str(k),
            n_texts=weights.shape[1],
            draws=draws,
        )
        for (name, k), draws in mean_accuracy(probes, data.test, weights).items()
    ]
    return estimates, _class_table(probes, ks)


def _class_table(probes: Sequence[SparseProbe], ks: Sequence[int]) -> pd.DataFrame:
    """A row a class: the SAE's chosen latents and accuracies, and the ceiling."""
    columns = ["class", "n test", *(f"SAE, k = {k}" for k in ks), "whole activation", "latents"]
    rows: dict[str, dict[str, Any]] = {}
    for probe in probes:
        row = rows.setdefault(probe.task, {"class": probe.task, "n test": len(probe.test)})
        if probe.dictionary == "sae":
            row[f"SAE, k = {probe.k}"] = probe.accuracy
            if probe.k == max(ks):
                row["latents"] = ", ".join(map(str, probe.latents))
        elif probe.dictionary == "dense":
            row["whole activation"] = probe.accuracy
    return pd.DataFrame(list(rows.values()), columns=columns)


# ---------------------------------------------------------------------- perturbation


def tpp_suite(
    subject: Subject,
    data: TaskData,
    codes: Sequence[PooledCodes],
    ns: Sequence[int],
    weights: Float64[Tensor, "r n"],
    seed: int,
) -> list[Measured]:
    """The TPP score by dictionary and n. Raises `UserError` for fewer than three classes."""
    tasks = binary_tasks(data, seed)
    _, probes = dense_probes(data.pooled().double().numpy(), tasks)
    measured = [measure_tpp(pooled, data, tasks, probes, ns) for pooled in codes]
    if subject.name == "sae":
        measured.append(measure_tpp(codes[0], data, tasks, probes, ns, random_seed=seed))
        own = directions(data, probes.values())
        measured.append(measure_tpp(own, data, tasks, probes, (1,)))
    return [
        _perturbed("tpp", subject, each, n, draws)
        for each in measured
        for n, draws in tpp_scores(each, weights).items()
    ]


def directions(data: TaskData, probes: Iterable[LinearProbe]) -> PooledCodes:
    """All texts' codes along the probes' own directions."""
    return pool_codes(probe_dictionary(data, np.stack([probe.weight for probe in probes])), data)


def scr_suite(
    subject: Subject,
    data: TaskData,
    codes: Sequence[PooledCodes],
    groups: tuple[Groups, Groups],
    ns: Sequence[int],
    weights: Float64[Tensor, "r n"],
    seed: int,
) -> tuple[list[Measured], list[dict[str, Any]], list[str]]:
    """The SCR score by target, dictionary and n, each target's probes, and what was left out.

    A target whose bias costs nothing, the interval of oracle minus base reaching 0, has no score:
    it would be a ratio of noise. Raises `UserError` where a combination of the groups has too few
    texts.
    """
    x = data.pooled().double().numpy()
    estimates, rows, notes = [], [], []
    for swapped in (False, True):
        task = make_spurious(data, *groups, swapped=swapped, seed=seed)
        probes = fit_spurious(x, task)
        measured = [measure_scr(pooled, data, task, probes, ns) for pooled in codes]
        if subject.name == "sae":
            measured.append(measure_scr(codes[0], data, task, probes, ns, random_seed=seed))
            own = directions(data, [probes.spurious])
            measured.append(measure_scr(own, data, task, probes, (1,)))
        scores = scr_scores(measured[0], weights)
        low, _ = interval((scores.oracle - scores.base)[1:], len(task.test))
        if low > 0:
            estimates += [
                _perturbed("scr", subject, each, n, draws, task.target)
                for each in measured
                for n, draws in scr_scores(each, weights).scores.items()
            ]
        elif not subject.repeats:
            notes.append(
                f"scr on activations{subject.place}, {task.target}: its bias costs nothing that "
                "these texts show, so there is nothing to remove."
            )
        if not subject.repeats:
            rows.append(
                {
                    "activations": f"activations{subject.place}",
                    "target": task.target,
                    "spurious": task.spurious,
                    "n train": len(task.biased),
                    "n test": len(task.test),
                    "biased accuracy": float(scores.base[0]),
                    "unbiased accuracy": float(scores.oracle[0]),
                }
            )
    return estimates, rows, notes


def _perturbed(
    suite: str,
    subject: Subject,
    measured: Perturbation,
    n: int,
    draws: Float64[Tensor, " r"],
    variant: str = "",
) -> Measured:
    return Measured(
        suite=suite,
        subject=subject.name,
        name=measured.name,
        label=measured.label,
        setting=str(n),
        n_texts=int(measured.answers.asked.any(0).sum()),
        draws=draws,
        variant=variant,
    )


# ---------------------------------------------------------------------- absorption


def absorption_suite(
    subject: Subject, words: TaskData, weights: Float64[Tensor, "r n"], seed: int
) -> tuple[list[Measured], pd.DataFrame, list[str]]:
    """Mean absorption by dictionary and rule, the SAE's letters, and what was left out."""
    letters = find_letters(words)
    enough = _scored(letters, MIN_PROBE_F1)
    if not enough:
        best = max(letter.f1 for letter in letters)
        note = (
            f"absorption of {subject.label}: no letter's probe reaches F1 {MIN_PROBE_F1:g} with "
            f"{MIN_WORDS} words (the best has {best:.2f}), so there is nothing to absorb."
        )
        return [], pd.DataFrame(), [note]
    own = pool_codes(sae_dictionary(subject.sae, label=subject.label), words)
    estimates: list[Measured] = []
    by_rule: dict[str, list[LetterAbsorption]] = {}
    measured = [(own, enough, "")]
    if subject.name == "sae":
        k = max(1, round(own.l0))
        random = pool_codes(random_dictionary(words, subject.sae.config.d_sae, k, seed), words)
        floor = [
            each for each in find_letters(shuffled(words, seed)) if len(each.words) >= MIN_WORDS
        ]
        measured += [(own, floor, "shuffled"), (random, enough, "")]
    for rule, thresholds in THRESHOLDS.items():
        config = AbsorptionConfig(thresholds=thresholds, seed=seed)
        for pooled, of, control in measured:
            if not of:
                continue
            found = measure_absorption(pooled, words, of, config)
            estimates += _absorbed(subject, words, pooled, rule, control, found, weights)
            by_rule.setdefault(rule, found)
    return estimates, _letter_table(by_rule), _left_out(letters, enough, subject)


def _scored(letters: Sequence[Letter], least_f1: float) -> list[Letter]:
    """The letters whose probe is good enough and recognises enough test words."""
    return [each for each in letters if each.f1 >= least_f1 and len(each.words) >= MIN_WORDS]


def _absorbed(
    subject: Subject,
    words: TaskData,
    pooled: PooledCodes,
    rule: str,
    control: str,
    found: list[LetterAbsorption],
    weights: Float64[Tensor, "r n"],
) -> Iterator[Measured]:
    """The score, and with the letters as they are that of random directions too."""
    mean = mean_absorption(found, words.test, weights)
    name, label = pooled.dictionary.name, pooled.dictionary.label
    scores = {
        (name, label): mean.score,
        (f"{name}/random", f"{label}, random directions"): mean.random,
    }
    if control:
        scores = {(f"{name}/{control}", f"{label}, {control} letters"): mean.score}
    for (each, text), draws in scores.items():
        yield Measured(
            suite="absorption",
            subject=subject.name,
            name=each,
            label=text,
            setting=rule,
            n_texts=sum(len(letter.words) for letter in found),
            draws=draws,
        )


def _letter_table(by_rule: dict[str, list[LetterAbsorption]]) -> pd.DataFrame:
    paper, released = by_rule["paper"], by_rule["released"]
    return pd.DataFrame(
        [
            {
                "letter": a.letter,
                "words": len(a.words),
                "probe F1": a.probe_f1,
                "main latents": ", ".join(map(str, a.main)),
                "main F1": a.main_f1,
                "absorbed (paper)": float(a.scores.mean()),
                "random direction (paper)": float(a.random.mean()),
                "absorbed (released)": float(b.scores.mean()),
                "random direction (released)": float(b.random.mean()),
            }
            for a, b in zip(paper, released, strict=True)
        ]
    )


def _left_out(letters: list[Letter], enough: list[Letter], subject: Subject) -> list[str]:
    kept = {letter.name for letter in enough}
    dropped = [letter.name for letter in letters if letter.name not in kept]
    if not dropped:
        return []
    return [
        f"absorption of {subject.label}: letters {', '.join(dropped)} are left out, whose probes "
        f"have an F1 below {MIN_PROBE_F1:g} or fewer than {MIN_WORDS} recognised test words."
    ]


# ---------------------------------------------------------------------- geometry


def matching_suite(subjects: Sequence[Subject], seed: int) -> tuple[pd.DataFrame, dict]:
    """The first SAE matched with each of the others, beside random directions of the same sizes."""
    first = subjects[0]
    rows, cosines = [], {}
    for other in subjects[1:]:
        sizes = first.sae.config.d_sae, other.sae.config.d_sae
        d = first.sae.config.d_in
        control = (random_directions(size, d, seed + i) for i, size in enumerate(sizes))
        pairs = (
            (f"with the {other.label}", (first.sae.W_dec.detach(), other.sae.W_dec.detach())),
            (f"random directions ({other.label})", tuple(control)),
        )
        for what, (a, b) in pairs:
            found = match_decoders(a, b)
            rows.append({"matched": what} | found.summary())
            cosines[what] = found.cosines.abs().numpy()
    return pd.DataFrame(rows), cosines


def coherence_suite(subjects: Sequence[Subject], seed: int) -> tuple[pd.DataFrame, dict]:
    """Every SAE's coherence, beside random directions of the first one's size."""
    config = subjects[0].sae.config
    random = random_directions(config.d_sae, config.d_in, seed)
    dictionaries = [(each.label, each.sae.W_dec.detach()) for each in subjects]
    rows, cosines = [], {}
    for label, directions in [*dictionaries, ("random directions", random)]:
        found = coherence(directions)
        rows.append(
            {
                "dictionary": label,
                "latents": len(found.nearest),
                "largest cosine": found.max_cosine,
                "mean nearest cosine": found.mean_nearest,
                "Welch bound": found.welch_bound,
            }
        )
        cosines[label] = found.nearest.numpy()
    return pd.DataFrame(rows), cosines
