"""Labels that an endpoint gives, and labels without a rule scored through the endpoint.

The contexts are those of offline labels (`saes.label_contexts`), the score is the same balanced
accuracy; only who answers differs. To keep requests few, at most `Endpoint.contexts` held-out
contexts of a feature are shown, half of them active.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from saes.label_contexts import Contexts
from saes.label_detection import score_answers
from saes.label_endpoint import (
    Answers,
    Endpoint,
    label_prompt,
    parse_active,
    parse_label,
    score_prompt,
)
from saes.label_texts import Texts
from saes.labels import LABELS, Subject, counted, scored


def endpoint_labels(
    subject: Subject,
    endpoint: Endpoint,
    answers: Answers,
    features: Sequence[int],
    *,
    progress: bool = True,
) -> dict[int, str]:
    """Ask for a label of each feature; those whose answer holds none are left out."""

    def ask(feature: int) -> str | None:
        return parse_label(endpoint.ask(label_question(subject, endpoint, feature)))

    said = answers.collect("label", features, ask, parallel=endpoint.parallel, progress=progress)
    return {feature: label for feature, label in said.items() if label is not None}


def label_question(subject: Subject, endpoint: Endpoint, feature: int) -> str:
    """The prompt that asks for a feature's label: making contexts, the strongest first."""
    making, _, _, firing = subject.contexts(feature)
    ordered = subject.sampler.strongest(feature, making.width)[: endpoint.examples]
    fired = set(firing.flat.tolist())
    shown = [marked(subject.texts, int(block), making.width, fired) for block in ordered]
    return label_prompt(shown, subject.promotes(feature))


def marked(texts: Texts, block: int, width: int, fired: set[int]) -> str:
    """A block's text with the tokens in `<<` and `>>` that stand at fired places."""
    places = texts.places(np.array([block]), width)[0].tolist()
    return "".join(
        f"<<{text}>>" if place in fired else text
        for place, text in zip(places, block_texts(texts, places), strict=True)
    )


def block_texts(texts: Texts, places: Sequence[int]) -> list[str]:
    """The tokens' texts, line breaks as `\\n`; empty where there is no token."""
    named = [*texts.words.texts, ""]
    return [named[texts.tokens[place]].replace("\n", "\\n") for place in places]


def asked_table(
    subject: Subject,
    labels: Mapping[int, str],
    method: str,
    *,
    endpoint: Endpoint | None,
    answers: Answers | None,
    progress: bool = True,
) -> pd.DataFrame:
    """The table of labels that have no rule, scored through the endpoint where there is one."""
    if endpoint is None or answers is None:
        return unscored_table(labels, method)
    rows = unscored_rows(labels, method)
    others = control_pairs(sorted(labels), subject.config.seed)

    def ask(feature: int) -> dict[str, Any]:
        prompts = {"own": labels[feature]}
        if others:
            prompts["control"] = labels[others[feature]]
        shown = shown_contexts(subject, endpoint, feature)
        if not len(shown):
            return {}
        contexts = [marked(subject.texts, int(block), width, set()) for block, width in shown]
        return {
            name: parse_active(endpoint.ask(score_prompt(label, contexts)), len(contexts))
            for name, label in prompts.items()
        }

    said = answers.collect("score", labels, ask, parallel=endpoint.parallel, progress=progress)
    for row in rows:
        row |= _verdict(subject, endpoint, row["feature"], said[row["feature"]])
    return pd.DataFrame(rows, columns=LABELS.names)


def unscored_table(labels: Mapping[int, str], method: str) -> pd.DataFrame:
    """The table of labels that nobody scores."""
    return pd.DataFrame(unscored_rows(labels, method), columns=LABELS.names)


def unscored_rows(labels: Mapping[int, str], method: str) -> list[dict[str, Any]]:
    """A row a label, without score."""
    return [
        {"feature": feature, "label": label, "method": method} for feature, label in labels.items()
    ]


def control_pairs(features: Sequence[int], seed: int) -> dict[int, int]:
    """Another labelled feature for each, whose label is its control; empty for a single one."""
    if len(features) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(np.asarray(features)).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def shown_contexts(subject: Subject, endpoint: Endpoint, feature: int) -> list[tuple[int, int]]:
    """Blocks to show, in mixed order, with their width."""
    contexts = _shown(subject, endpoint, feature)
    order = _order(subject, feature, len(contexts.blocks))
    return [(int(block), contexts.width) for block in contexts.blocks[order]]


def _order(subject: Subject, feature: int, n: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([subject.config.seed, feature]).permutation(n)


def _shown(subject: Subject, endpoint: Endpoint, feature: int) -> Contexts:
    """The held-out contexts that the endpoint judges, active ones first."""
    _, testing, _, _ = subject.contexts(feature)
    half = endpoint.contexts // 2
    rng = np.random.default_rng([subject.config.seed, feature, 1])
    positive = rng.permutation(testing.positive)[:half]
    hard, easy = testing.negative[: testing.n_hard], testing.negative[testing.n_hard :]
    n_hard = min(len(hard), max(half // 2, half - len(easy)))
    negative = np.concatenate([hard[:n_hard], easy[: half - n_hard]])
    return Contexts(width=testing.width, positive=positive, negative=negative, n_hard=n_hard)


def _verdict(
    subject: Subject, endpoint: Endpoint, feature: int, said: Mapping[str, list[bool] | None]
) -> dict[str, Any]:
    """The score columns of a feature from the endpoint's verdicts, which are in shown order."""
    contexts = _shown(subject, endpoint, feature)
    back = np.argsort(_order(subject, feature, len(contexts.blocks)))
    scores = {
        name: score_answers(np.array(verdict, bool)[back], len(contexts.positive))
        for name, verdict in said.items()
        if verdict is not None
    }
    own, control = scores.get("own"), scores.get("control")
    if own is None:
        return counted(contexts)
    return counted(contexts) | scored(own, [] if control is None else [control.value])
