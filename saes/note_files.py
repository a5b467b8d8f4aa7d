"""Labels, notes and lists as files: a JSON document to carry them over, and a CSV table to read.

    {"kind": "lorgnette notes", "schema": 1,
     "features": [{"sae": "...", "feature": 7,
                   "versions": [{"label": "...", "note": "...", "changed": "2026-01-31T..."}]}],
     "lists": [{"name": "...",
                "members": [{"sae": "...", "feature": 7, "note": "..."}]}]}

Versions stand in the order in which they were saved, the one that counts last. Every key has to be
there and no other may: a document of a later schema is refused, not half read.
"""

import csv
import io
import itertools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from probe.errors import UserError
from saes.note_texts import Member, Note, checked_label, checked_list, checked_note, checked_place

KIND, SCHEMA = "lorgnette notes", 1
KEYS: Mapping[str, Mapping[str, type]] = {
    "the document": {"kind": str, "schema": int, "features": list, "lists": list},
    "a feature": {"sae": str, "feature": int, "versions": list},
    "a version": {"label": str, "note": str, "changed": str},
    "a list": {"name": str, "members": list},
    "a member of a list": {"sae": str, "feature": int, "note": str},
}
COLUMNS = ("sae", "feature", "label", "note", "version", "changed")


Place = tuple[str, int]
"""An SAE's name and a feature's number."""
Entry = tuple[str, Member]
"""A list's name and a member of it."""


def write_document(texts: Sequence[tuple[Place, Note]], entries: Sequence[Entry]) -> dict[str, Any]:
    """The document of these texts, sorted by feature and version, and members, sorted by list."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "features": [
            {
                "sae": sae,
                "feature": feature,
                "versions": [
                    {"label": text.label, "note": text.note, "changed": text.changed}
                    for _, text in versions
                ],
            }
            for (sae, feature), versions in itertools.groupby(texts, operator.itemgetter(0))
        ],
        "lists": [
            {"name": name, "members": [asdict(member) for _, member in members]}
            for name, members in itertools.groupby(entries, operator.itemgetter(0))
        ],
    }


def parse_document(text: str | bytes) -> Any:
    """The JSON in a file. Raises `UserError` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"this file is not JSON ({error}); give one that an export of notes wrote."
        ) from error


def read_document(document: Any) -> tuple[dict[Place, list[Note]], list[Entry]]:
    """The versions by SAE and feature, and the members of all lists, everything checked.

    Raises `UserError` where anything is not as the module says or cannot be stored.
    """
    _check(document, "the document")
    if (document["kind"], document["schema"]) != (KIND, SCHEMA):
        raise UserError(
            f"notes of kind {KIND!r} and schema {SCHEMA} can be read; got {document['kind']!r} and "
            f"{document['schema']}: export them again with this version."
        )
    features: dict[Place, list[Note]] = {}
    for described in document["features"]:
        _check(described, "a feature")
        place = (described["sae"], checked_place(described["sae"], described["feature"]))
        if place in features or not described["versions"]:
            raise UserError(
                f"a file of notes has each feature once, with a version or more; feature "
                f"{place[1]} of {place[0]} is not so: correct it."
            )
        features[place] = [_version(n, text) for n, text in enumerate(described["versions"], 1)]
    return features, list(_entries(document["lists"]))


def _version(number: int, text: Any) -> Note:
    _check(text, "a version")
    try:
        changed = datetime.fromisoformat(text["changed"])
        zoned = changed if changed.tzinfo else changed.replace(tzinfo=UTC)
        moment = zoned.astimezone(UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError) as error:
        raise UserError(
            "in a file of notes `changed` is a time such as 2026-01-31T12:00:00+00:00; "
            f"got {text['changed']!r}."
        ) from error
    label, note = checked_label(text["label"]), checked_note(text["note"])
    return Note(label=label, note=note, version=number, changed=moment)


def _entries(lists: Sequence[Any]) -> Iterator[Entry]:
    for described in lists:
        _check(described, "a list")
        name = checked_list(described["name"])
        for member in described["members"]:
            _check(member, "a member of a list")
            sae, note = member["sae"], checked_note(member["note"])
            yield name, Member(sae=sae, feature=checked_place(sae, member["feature"]), note=note)


def _check(value: Any, what: str) -> None:
    """Raise `UserError` unless `value` is an object with the keys of `what`, and no other."""
    wanted = KEYS[what]
    if not isinstance(value, dict) or value.keys() != wanted.keys():
        got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f"in a file of notes {what} has the keys {', '.join(wanted)}; got {got or 'none'}."
        )
    for key, kind in wanted.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise UserError(
                f"in a file of notes `{key}` of {what} is of type {kind.__name__}; "
                f"got {value[key]!r}."
            )


def labels_csv(latest: Mapping[Place, Note]) -> str:
    """What counts now of each feature, as a CSV table of `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, note in latest.items():
        writer.writerow([*place, note.label, note.note, note.version, note.changed])
    return text.getvalue()
