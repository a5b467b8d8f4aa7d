"""Texts with a class, for measuring what a dictionary knows of that class.

A set of labelled texts is named by

    builtin                        the built-in corpus; its columns are `form` and `topic`
    first_letter                   single-token words of the model's vocabulary by first letter
    PATH.jsonl PATH.csv PATH.parquet
                                   a text a row: a column `text` and the columns that are asked for

A text has one label and, where a second column is asked for, one attribute: spurious-correlation
removal needs both. What is kept, and which texts test, depends on the texts alone and not on their
order: texts are ordered by a hash of seed and text, the first `max_per_class` of each label are
kept and the first `test_share` of those are for testing. A text that stands there twice is one
text, so that nothing is on both sides.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from probe.corpora import BUILTIN, builtin_path
from probe.errors import Failure, UserError

FIRST_LETTER = "first_letter"
SUFFIXES = (".jsonl", ".csv", ".parquet")
MIN_WORD = 3
"""Letters in the shortest word: of shorter ones the token says nearly all."""

Groups = dict[str, tuple[str, ...]]
"""Names of groups of values, with the values in each."""

BUILTIN_GROUPS: dict[str, Groups] = {
    "form": {
        "told": ("story", "diary", "poem", "dialogue", "letter", "speech"),
        "explained": ("explanation", "list", "howto", "history", "questions", "arithmetic"),
    },
    "topic": {
        "nature": (
            "the ocean tides", "the moon", "earthquakes", "honey bees", "volcanoes",
            "migrating birds", "rain forests", "winter storms", "dinosaurs", "the desert",
            "sharks", "rivers", "wolves", "the weather forecast", "coral reefs", "butterflies",
            "salt", "the human heart", "the brain", "the immune system", "temperature records",
            "mountain climbing", "potatoes", "a lost dog", "space travel", "fishing boats",
        ),
        "society": (
            "public libraries", "a train journey", "chess", "the price of apples", "football",
            "the stock market", "a wedding", "a hospital night shift", "a court case",
            "a football coach", "a village festival", "computer viruses", "an election",
            "a museum theft", "a new neighbour", "coffee prices", "a bakery's accounts",
            "the French language", "a city bus route", "a job interview", "the theatre",
            "an airport", "a lottery ticket", "an elderly teacher", "the alphabet",
            "a piano lesson",
        ),
    },
}  # fmt: skip
"""Two groups of forms and two of topics, by column: a target and a spurious property."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """A text and what is known of it."""

    id: str
    """Its name in its source."""
    text: str
    """The text itself."""
    label: str
    """Its class."""
    attribute: str = ""
    """Its value in the second column; empty where none is asked for."""
    test: bool = False
    """Whether it tests, instead of training."""


def read_labelled(source: str, label: str, attribute: str | None) -> list[LabelledText]:
    """The texts of a source with their label and attribute, each text once.

    Raises:
        UserError: there is no such source or column, a row lacks a value, or one text has two
            different labels.
        Failure: its file is damaged.
    """
    path = builtin_path() if source == BUILTIN else Path(source)
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        raise UserError(
            f"data set {source!r} is not there: wanted {BUILTIN}, or a file ending in "
            f"{', '.join(SUFFIXES)} with a column `text` and a column of labels."
        )
    wanted = ["text", label, *([attribute] if attribute else [])]
    found: dict[str, LabelledText] = {}
    for number, row in enumerate(_rows(path, wanted)):
        name = f"{path.name}:{number + 1}"
        values = _values(row, wanted, name)
        read = LabelledText(
            id=str(row.get("id") or name),
            text=values[0],
            label=values[1],
            attribute=values[2] if attribute else "",
        )
        known = found.setdefault(read.text, read)
        if (known.label, known.attribute) != (read.label, read.attribute):
            raise UserError(
                f"{name} is the same text as {known.id} with another label; leave one of them out."
            )
    return list(found.values())


def _values(row: dict[str, Any], wanted: Sequence[str], name: str) -> list[str]:
    values = ["" if row.get(column) is None else str(row[column]) for column in wanted]
    for column, value in zip(wanted, values, strict=True):
        if not value.strip():
            there = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"{name} has no `{column}`; its columns are: {there}. Name the column of labels "
                "that the file has, and fill every row."
            )
    return values


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file as dicts; raises as `read_labelled` does."""
    try:
        if path.suffix == ".parquet":
            columns = [name for name in pq.read_schema(path).names if name in ("id", *wanted)]
            yield from pq.read_table(path, columns=columns).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                yield from csv.DictReader(file)
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield from _json_rows(file)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise Failure(f"{path} is damaged or not {path.suffix} ({error}); get it again.") from error


def _json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a line holds {type(row).__name__} where an object was wanted")
            yield row


def first_letter_words(vocabulary: Sequence[str]) -> list[LabelledText]:
    """Tokens that are a space and at least three lower-case letters, by first letter.

    `vocabulary` is every token's text by id; a word's `id` is its token's number. Raises
    `UserError` where there are none.
    """
    words = [
        LabelledText(id=str(number), text=text, label=text[1])
        for number, text in enumerate(vocabulary)
        if text[:1] == " " and text.isascii() and text[1:].isalpha() and text[1:].islower()
        if len(text) > MIN_WORD
    ]
    if not words:
        raise UserError(
            "the tokenizer has no single-token words with a space in front, which the first-letter "
            "task is made of; leave the task out for this model."
        )
    return list({word.text: word for word in words}.values())


def split_texts(
    texts: Sequence[LabelledText],
    *,
    max_per_class: int | None,
    min_per_class: int,
    test_share: float,
    seed: int,
) -> list[LabelledText]:
    """The texts that are kept, with `test` set, by the rule in the module's docstring.

    Labels of fewer than `min_per_class` texts are left out. Raises `UserError` where fewer than two
    labels are left.
    """
    by_label: dict[str, list[LabelledText]] = {}
    for text in sorted(texts, key=lambda each: _hash(seed, each.text)):
        by_label.setdefault(text.label, []).append(text)
    large = {name: group for name, group in by_label.items() if len(group) >= min_per_class}
    if len(large) < 2:
        counts = ", ".join(f"{name} ({len(group)})" for name, group in sorted(by_label.items()))
        raise UserError(
            f"two labels with at least {min_per_class} texts each were wanted and there are: "
            f"{counts[:300] or 'none'}; give more texts, or a column with fewer different values."
        )
    kept = []
    for name in sorted(large):
        group = large[name][:max_per_class]
        n_test = math.ceil(len(group) * test_share)
        kept += [replace(text, test=i < n_test) for i, text in enumerate(group)]
    return kept


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def two_groups(values: Iterable[str], source: str, column: str) -> Groups:
    """Two groups of a column's values, to set against each other.

    Those of the built-in corpus are written down in `BUILTIN_GROUPS`; of any other source they are
    the two most frequent values. Raises `UserError` where there is only one.
    """
    if source == BUILTIN and column in BUILTIN_GROUPS:
        return BUILTIN_GROUPS[column]
    common = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))[:2]
    if len(common) < 2:
        raise UserError(
            f"column {column!r} of {source} has a single value; spurious-correlation removal needs "
            "two values of each of two columns."
        )
    return {value: (value,) for value, _ in common}
