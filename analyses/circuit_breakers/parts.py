"""What is measured of a broken model beside the original: each function fills tables.

Every row says its `subject`, and the `run` (a seed, or an ablation's name and seed) that `study`
adds. Rows of the original model are measured once a subject.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.cells import Frame, Tables
from analyses.circuit_breakers.asking import (
    Ask,
    Asked,
    after_turns,
    concept_attacks,
    plain,
    with_soft_tokens,
)
from analyses.circuit_breakers.attacks import (
    COEFFICIENTS,
    SOFT_TOKENS,
    SoftPrompts,
    optimise_soft_prompt,
    steered,
    steering_vectors,
)
from analyses.circuit_breakers.capability import (
    Choice,
    multiple_choice,
    read_choices,
    response_change,
    response_pairs,
    text_nll,
)
from analyses.circuit_breakers.features import (
    Read,
    difference,
    feature_rows,
    putting_back,
    read_row,
)
from analyses.circuit_breakers.inside import change_tables
from analyses.circuit_breakers.judging import Judge, Limits, judged, mean_nll, measures, repetition
from analyses.circuit_breakers.measured import KEPT, SETS, Settings
from analyses.circuit_breakers.passages import ordinary_passages
from analyses.circuit_breakers.probes import (
    THRESHOLDS,
    ProbeKind,
    Reading,
    TokenStates,
    direction_table,
    fit_probe,
    layer_probes,
    matched_threshold,
    read_rows,
)
from analyses.circuit_breakers.robustness import tuned_curve
from analyses.circuit_breakers.rows import Passage, TokenRow, token_rows
from analyses.circuit_breakers.settings import Training
from analyses.circuit_breakers.states import rows_digest
from analyses.circuit_breakers.subjects import Subject
from probe.language import LanguageModel
from probe.prompt_sets import Row
from saes.recipe_saes import LoadedSae

Say = Callable[[str], None]
PROBED = 48
"""Passages of each set that probes are fitted on."""


@dataclass
class Bench:
    """A subject and the original model, with what is asked of every broken one."""

    subject: Subject
    """What is broken."""
    original: LanguageModel
    """The model as it was."""
    settings: Settings
    """How much is asked."""
    training: Training
    """How rows are cut."""
    others: Mapping[str, Sequence[Passage]] = field(default_factory=dict)
    """Other concepts' passages by name, for judging."""
    choices: Path | None = None
    """Multiple-choice questions; None for none."""
    say: Say = field(default=lambda _: None)
    """Told what is being done."""

    def rows(self, passages: Sequence[Passage]) -> list[TokenRow]:
        """Passages as rows, cut as in training."""
        return token_rows(
            self.original, passages, request_length=self.training.request_length,
            response_length=self.training.response_length,
        )  # fmt: skip

    @cached_property
    def test_rows(self) -> dict[str, list[TokenRow]]:
        """Rows of each set that training has not seen."""
        test = self.subject.passages.test
        return {name: self.rows(getattr(test, name)) for name in SETS}

    @cached_property
    def train_rows(self) -> dict[str, list[TokenRow]]:
        """Rows of each set that training has seen."""
        train = self.subject.passages.train
        return {name: self.rows(getattr(train, name)) for name in SETS}

    @cached_property
    def asked(self) -> dict[str, list[Asked]]:
        """Prompts by attack, and near misses and ordinary requests just asked."""
        test, train, n = self.subject.passages.test, self.subject.passages.train, self.settings.test
        concept = self.subject.concept
        if concept is None:
            found = {"none": plain(self.original, test.concept[:n])}
        else:
            found = concept_attacks(self.original, concept, test.concept, train.concept, n)
        return found | {
            "near": plain(self.original, test.near[:n]),
            "ordinary": plain(self.original, test.ordinary[:n]),
        }

    @cached_property
    def asked_digest(self) -> str:
        """What stands for all prompts in a cell's question."""
        rows = [
            TokenRow(ids=one.ids, shared=0, answer=0)
            for some in self.asked.values()
            for one in some
        ]
        return rows_digest(rows)

    @cached_property
    def answers(self) -> dict[str, list[Row]]:
        """What the original model goes on with, by attack; kept in memory alone."""
        self.say("the original's answers")
        return self._written(Ask(model=self.original))

    def _written(self, ask: Ask) -> dict[str, list[Row]]:
        """What a model goes on with, by attack."""
        prompts = [one.ids for asked in self.asked.values() for one in asked]
        written = iter(ask.continuations(prompts, self.settings.tokens))
        return {
            name: list(itertools.islice(written, len(asked))) for name, asked in self.asked.items()
        }

    @cached_property
    def judge(self) -> Judge | None:
        """Tells what is on the concept; None for harmful prompts."""
        return None if self.subject.concept is None else Judge(self.subject.passages)

    @cached_property
    def limits(self) -> Limits:
        """Up to where a continuation counts as coherent."""
        pairs = [
            (rows, tokens)
            for name, (_, responses) in self._responses.items()
            for rows, tokens in zip(self._read_responses[name], responses, strict=True)
        ]
        return Limits.of(
            [mean_nll(rows, tokens) for rows, tokens in pairs],
            [repetition(tokens) for answers in self.answers.values() for tokens in answers],
        )

    def _measured(
        self, ask: Ask, prompts: Sequence[Row], continuations: Sequence[Row]
    ) -> pd.DataFrame:
        """What continuations are like. The original reads them without soft tokens."""
        own = ask.reading(prompts, continuations)
        if ask == Ask(model=self.original):
            return measures(self.original, continuations, own, own)
        heard = [tuple(token for token in prompt if token >= 0) for prompt in prompts]
        original = Ask(model=self.original).reading(heard, continuations)
        return measures(self.original, continuations, original, own)

    # -------------------------------------------------------------------------------- outputs

    def outputs(self, model: LanguageModel, seed: int) -> Tables:
        """Answers under every attack (`outputs`) and soft tokens at growing budgets (`soft`)."""
        ask, original = Ask(model=model), model is self.original
        self.say("answers")
        written = self.answers if original else self._written(ask)
        tables = [
            self._answered(name, ask, asked, written[name]) for name, asked in self.asked.items()
        ]
        if self.subject.concept is None:
            return {"outputs": pd.concat(tables).drop(columns="text")}
        found = self._soft(model, seed)
        prompts = with_soft_tokens(self.original, self.asked["none"], SOFT_TOKENS)
        budgets = [self._soft_row(model, soft, steps, prompts) for steps, soft in found.items()]
        last = Ask(model=model, soft=found[max(found)])
        tables.append(self._answered("soft tokens", last, prompts))
        self.say("steering")
        train = self.subject.passages.train
        vectors = steering_vectors(
            model, *([one.ids for one in plain(model, some)] for some in (train.concept,
                                                                         train.ordinary))
        )  # fmt: skip
        for coefficient in COEFFICIENTS:
            ask = steered(model, vectors, coefficient)
            name = f"steering {coefficient:g}"
            tables.append(self._answered(name, ask, self.asked["none"]))
        return {"outputs": pd.concat(tables), "soft": pd.concat(budgets)}

    def _answered(
        self, name: str, ask: Ask, asked: Sequence[Asked], given: list[Row] | None = None
    ) -> pd.DataFrame:
        """Answers to prompts: what they are like, and how likely the original's answers are."""
        self.say(f"answers: {name}")
        prompts = [one.ids for one in asked]
        if given is None:
            given = ask.continuations(prompts, self.settings.tokens)
        found = judged(self._measured(ask, prompts, given), self.limits, self.judge)
        expected = self.answers.get(name, self.answers["none"])
        expected_nll = found["nll_own"] if given is expected else ask.nll(prompts, expected)
        return found.assign(
            attack=name, row=np.arange(len(asked)), topic=[one.topic for one in asked],
            request="" if self.judge is None else [one.request for one in asked],
            expected_nll=pd.Series(expected_nll).replace(np.inf, np.nan),
        )  # fmt: skip

    def _soft(self, model: LanguageModel, seed: int) -> dict[int, Float[Tensor, "k d"]]:
        self.say("soft tokens")
        answers = [row.ids[row.answer :] for row in self.train_rows["concept"]]
        found: SoftPrompts = optimise_soft_prompt(
            model, plain(model, self.subject.passages.train.concept), answers,
            self.settings.soft_steps, seed=seed,
        )  # fmt: skip
        return dict(found.by_budget)

    def _soft_row(
        self,
        model: LanguageModel,
        soft: Float[Tensor, "k d"],
        steps: int,
        prompts: Sequence[Asked],
    ) -> pd.DataFrame:
        nll = Ask(model=model, soft=soft).nll([p.ids for p in prompts], self.answers["none"])
        return pd.DataFrame({"steps": steps, "row": np.arange(len(nll)), "nll": nll})

    # ------------------------------------------------------------------------------ capability

    @cached_property
    def _responses(self) -> dict[str, tuple[list[Row], list[Row]]]:
        """Prompts and responses of what is to be kept, and of the concept."""
        if self.subject.concept is not None:
            return {name: response_pairs(self.test_rows[name]) for name in SETS}
        talk = ordinary_passages(self.settings.test, trained=False, seed=2)
        return {"ordinary": response_pairs(self.rows(talk))}

    @cached_property
    def _read_responses(self) -> dict[str, list[Float[Tensor, "_ v"]]]:
        return {name: Ask(model=self.original).reading(*of) for name, of in self._responses.items()}

    def _changed(self, broken: LanguageModel, name: str) -> pd.DataFrame:
        """How likely responses of a set are to both models, and how far the models are apart."""
        self.say(f"responses: {name}")
        after = Ask(model=broken).reading(*self._responses[name])
        return response_change(self._read_responses[name], after, self._responses[name][1])

    @cached_property
    def _texts(self) -> list[str]:
        chosen = ordinary_passages(self.settings.texts, trained=False, seed=1)
        return [passage.response for passage in chosen]

    @cached_property
    def _text_nll(self) -> Float[np.ndarray, " n"]:
        return text_nll(self.original, self._texts)

    @cached_property
    def _chosen(self) -> Float[np.ndarray, " n"]:
        return multiple_choice(self.original, self._questions)

    @cached_property
    def _questions(self) -> list[Choice]:
        return [] if self.choices is None else read_choices(self.choices, self.settings.questions)

    def capability(self, broken: LanguageModel) -> Tables:
        """Text, chat and multiple choice: table `capability`, a row a unit with both models."""
        self.say("held-out text")
        tables = [_paired("text", self._text_nll, text_nll(broken, self._texts))]
        for name in self._responses:
            if name != "concept":
                change = self._changed(broken, name)
                tables += [
                    _paired(f"chat: {name}", change["nll_original"], change["nll_broken"]),
                    _paired(f"KL: {name}", 0 * change["kl"], change["kl"]),
                ]
        if self._questions:
            self.say("multiple choice")
            tables.append(_paired("choice", self._chosen, multiple_choice(broken, self._questions)))
        return {"capability": pd.concat(tables)}

    # ---------------------------------------------------------------------------------- inside

    def inside(self, broken: LanguageModel) -> Tables:
        """Cosine and length by layer, row and token: tables `layers`, `profile`."""
        self.say("states")
        others = {f"{name} (not trained)": self.rows(texts) for name, texts in self.others.items()}
        return change_tables(self.original, broken, self.test_rows | others)

    # ---------------------------------------------------------------------------------- probes

    @cached_property
    def probe_layers(self) -> dict[ProbeKind, tuple[int, ...]]:
        """States that each kind of probe reads."""
        last = self.original.n_layers
        chosen: dict[ProbeKind, tuple[int, ...]] = {
            "linear": self.settings.probe_layers, "mlp": self.settings.mlp_layers
        }  # fmt: skip
        return {
            kind: tuple(dict.fromkeys(min(layer, last) for layer in layers))
            for kind, layers in chosen.items()
        }

    def _readings(self, model: LanguageModel) -> dict[str, tuple[Reading, Reading]]:
        """What probes read of the concept, and of everything else, for training and judging."""
        layers = sorted({layer for chosen in self.probe_layers.values() for layer in chosen})
        found = {}
        for part, rows in (("train", self.train_rows), ("test", self.test_rows)):
            chosen = {name: some[:PROBED] for name, some in rows.items()}
            found[part] = (
                read_rows(model, chosen["concept"], layers),
                read_rows(model, [*chosen["near"], *chosen["ordinary"]], layers),
            )
        return found

    @cached_property
    def _before(self) -> dict[str, tuple[Reading, Reading]]:
        return self._readings(self.original)

    def probes(self, broken: LanguageModel, seed: int) -> Tables:
        """What probes and a direction read, before and after: tables `probes`, `directions`."""
        self.say("probes")
        before, after = self._before, self._readings(broken)
        four = (before["train"], before["test"], after["train"], after["test"])

        def tokens(pair: tuple[Reading, Reading], layer: int) -> tuple[TokenStates, TokenStates]:
            return pair[0].tokens[layer], pair[1].tokens[layer]

        tables = [
            layer_probes(
                kind, tokens(four[0], layer), tokens(four[1], layer), tokens(four[2], layer),
                tokens(four[3], layer), seed=seed,
            ).assign(layer=layer)
            for kind, layers in self.probe_layers.items()
            for layer in layers
        ]  # fmt: skip
        ends = [(positive.ends, negative.ends) for positive, negative in four]
        directions = direction_table(ends[0], ends[1], ends[2], ends[3])
        return {"probes": pd.concat(tables), "directions": directions}

    def detection(self, outputs: Frame, seed: int) -> Tables:
        """A probe as the defence, beside rerouting: table `detection`, a row an attack and probe.

        The probe reads the original's answers; its threshold flags as many ordinary requests as
        rerouting breaks, or is a published one. What it flags counts as refused.
        """
        self.say("probe as a defence")
        ordinary = outputs[outputs["attack"].isin(KEPT)]
        broken_share = float(1 - ordinary["coherent"].mean())
        layer = self.probe_layers["mlp"][0]
        answered = {}
        for name, asked in self.asked.items():
            rows = [
                TokenRow(ids=one.ids + answer, shared=0, answer=len(one.ids))
                for one, answer in zip(asked, self.answers[name], strict=True)
            ]
            answered[name] = read_rows(self.original, rows, [layer]).tokens[layer]
        rows = []
        for kind in ("linear", "mlp"):
            train = (reading.tokens[layer] for reading in self._before["train"])
            probe = fit_probe(kind, *train, seed=seed)
            scores = {name: probe.score(states) for name, states in answered.items()}
            kept = np.concatenate([scores[name] for name in KEPT])
            matched = matched_threshold(kept, broken_share)
            cases = [("matched", matched)] + [("published", value) for value in THRESHOLDS[kind]]
            for how, threshold in cases:
                for name, values in scores.items():
                    rows += [
                        {"probe": kind, "how": how, "threshold": threshold, "attack": name,
                         "row": row, "flagged": bool(value > threshold), "layer": layer}
                        for row, value in enumerate(values)
                    ]  # fmt: skip
        return {"detection": pd.DataFrame(rows)}

    # -------------------------------------------------------------------------------- features

    def features(self, broken: LanguageModel, loaded: LoadedSae, seed: int) -> Tables:
        """An SAE's features: tables `features`, `readded`, `dictionary` (a row an SAE and set)."""
        self.say(f"features: {loaded.run.path.name}")
        found, reads = {}, {}
        for name in SETS:
            rows = self.test_rows[name]
            reads[name] = [
                (read_row(self.original, row, loaded), read_row(broken, row, loaded))
                for row in rows
            ]
            found[name] = difference(self.original, reads[name], rows)
        described = pd.DataFrame(
            [
                {"set": name, "shared": one.shared, "fvu original": one.fvu_original,
                 "fvu broken": one.fvu_broken}
                for name, one in found.items()
            ]
        )  # fmt: skip
        tables = {
            "features": feature_rows(found["concept"], found["ordinary"]), "dictionary": described
        }  # fmt: skip
        answered = [row.answer < len(row.ids) for row in self.test_rows["concept"]]
        if all(answered):
            pairs: list[tuple[Read, Read]] = reads["concept"]
            tables["readded"] = pd.concat(
                [
                    putting_back(
                        broken, self.test_rows["concept"], loaded, pairs, found["concept"],
                        seed=seed, say=lambda _: self.say("putting features back"),
                    ),
                    self._unbroken(),
                ]
            )  # fmt: skip
        return {name: table.assign(sae=loaded.run.path.name) for name, table in tables.items()}

    def _unbroken(self) -> pd.DataFrame:
        nll = Ask(model=self.original).nll(*response_pairs(self.test_rows["concept"]))
        return pd.DataFrame({"change": "original", "n": 0, "row": np.arange(len(nll)), "nll": nll})

    # ------------------------------------------------------------------------------ robustness

    def robustness(self, model: LanguageModel, seed: int) -> Tables:
        """Fine-tuning and talk before the request: tables `tuning`, `turns`.

        `seed` decides the draws of the fine-tuning.
        """
        if self.subject.concept is None:
            return {}
        tables = []
        for name in ("ordinary", "concept"):
            self.say(f"fine-tuning on {name} passages")
            text, rows = self.train_rows[name], self.test_rows["concept"]
            curve = tuned_curve(model, text, rows, self.settings.tuning_steps, seed=seed)
            tables.append(curve.assign(text=name))
        self.say("longer conversations")
        test, train = self.subject.passages.test, self.subject.passages.train
        talked = []
        for n in self.settings.turns:
            asked = after_turns(model, test.concept[: self.settings.test], train.ordinary, n)
            prompts = [one.ids for one in asked]
            nll = Ask(model=model).nll(prompts, self.answers["none"])
            talked.append(pd.DataFrame({"turns": n, "row": np.arange(len(nll)), "nll": nll}))
        return {"tuning": pd.concat(tables), "turns": pd.concat(talked)}

    # ------------------------------------------------------------------------------- ablations

    @cached_property
    def _asked_nll(self) -> dict[str, Float[np.ndarray, " n"]]:
        """How likely the original's answers are to itself."""
        return {
            name: np.array(
                Ask(model=self.original).nll([one.ids for one in asked], self.answers[name])
            )
            for name, asked in self.asked.items()
            if name in ("prefill", "few-shot")
        }

    def brief(self, broken: LanguageModel) -> Tables:
        """What an ablation is judged by: table `brief`, a row a measure and unit."""
        tables = []
        for name in SETS:
            change = self._changed(broken, name)
            tables.append(_paired(name, change["nll_original"], change["nll_broken"]))
            if name != "concept":
                tables.append(_paired(f"KL: {name}", 0 * change["kl"], change["kl"]))
        for name in ("prefill", "few-shot"):
            self.say(f"responses: {name}")
            prompts = [one.ids for one in self.asked[name]]
            after = Ask(model=broken).nll(prompts, self.answers[name])
            tables.append(_paired(name, self._asked_nll[name], np.array(after)))
        cells = change_tables(self.original, broken, self.test_rows)["layers"]
        return {"brief": pd.concat(tables), "layers": cells}


def _paired(measure: str, original: Frame, broken: Frame) -> pd.DataFrame:
    """A measure of both models on the same units."""
    return pd.DataFrame(
        {
            "measure": measure, "row": np.arange(len(original)),
            "original": np.asarray(original), "broken": np.asarray(broken),
        }
    )  # fmt: skip


def ablations(training: Training) -> Mapping[str, tuple[Training, bool]]:
    """The other ways to train, by name, each with whether it concerns a claim of the paper."""
    claimed: dict[str, Training] = {
        loss: replace(training, loss=loss) for loss in ("rmu", "randc", "randp")
    }
    claimed["no near misses retained"] = replace(training, borderline=0.0)
    claimed["half the requests blanked"] = replace(training, blank=0.5)
    one_by_one: dict[str, Training] = {
        "published constants": replace(
            training, alpha=5.0, lr=1e-4, retain="absolute", retain_weight=1.0, padded_mean=True,
            masking="padding", b_std=0.0, lora_dropout=0.05,
        ),
        "absolute retain term": replace(training, retain="absolute", retain_weight=1.0),
        "retain weight 1": replace(training, retain_weight=1.0),
        "B begins at 0": replace(training, b_std=0.0),
        "no token masked": replace(training, masking="padding"),
        "only the first token masked": replace(training, masking="first"),
        "published rate, 1e-4": replace(training, lr=1e-4),
        "sets shuffled (control)": replace(training, shuffled_sets=True),
        "alpha 3": replace(training, alpha=3.0),
        "alpha 30": replace(training, alpha=30.0),
    }  # fmt: skip
    targets = list(training.target_layers)
    if len(targets) > 1:
        one_by_one |= {
            f"layer {layer} alone": replace(training, target_layers=(layer,)) for layer in targets
        }
    if (down := targets[0] // 2) > 0:
        earlier = tuple(layer - down for layer in targets)
        named = " and ".join(map(str, earlier))
        one_by_one[f"layers {named}"] = replace(training, target_layers=earlier)
    return {name: (one, True) for name, one in claimed.items()} | {
        name: (one, False) for name, one in one_by_one.items()
    }
