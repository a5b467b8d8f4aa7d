"""What people write about features: labels, notes and lists, in one SQLite file for all SAEs.

    versions   every text that was ever saved: (sae, feature, version) -> label, note, when
    members    which features are in which list; a list is there as long as it has a member
    revision   one number that grows with every change, for caches to look at

A text is saved on top of the version that its writer has read. Where another tab or process has
saved meanwhile, nothing is written and `Conflict` carries what the other wrote; saving on top of
that is then possible, and `history` holds both. Versions of a feature count 1, 2, 3, ... and none
is ever changed or removed.

The file is in SQLite's write-ahead mode: readers never wait, writers wait for each other. It is
made by the first save; until then every question has the answer of an empty one. An SAE is known by
the name of its folder. `saes.note_store` opens the file, `saes.note_files` defines the exports.
"""

import operator
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probe.errors import UserError
from saes.note_files import Place, labels_csv, read_document, write_document
from saes.note_store import NoteStore
from saes.note_texts import Member, Note, checked_label, checked_list, checked_note, checked_place

__all__ = ["Conflict", "Member", "Merged", "Note", "Notes"]

LATEST = (
    "SELECT sae, feature, label, note, max(version), changed FROM versions {where} "
    "GROUP BY sae, feature ORDER BY sae, feature"
)
"""SQLite takes the other columns from the row that has the largest version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What came of loading a file of notes, in features and members of lists."""

    added: int = 0
    """Features that had no text here."""
    updated: int = 0
    """Features whose text in the file is the newer one; the older stays in the history."""
    kept: int = 0
    """Features whose text here is the newer one and differs: it stays."""
    same: int = 0
    """Features whose text is here already."""
    listed: int = 0
    """Members of lists that were not in them."""


class Conflict(UserError):
    """Another has saved meanwhile; `theirs` is what is there now."""

    def __init__(self, message: str, theirs: Note) -> None:
        super().__init__(message)
        self.theirs = theirs


class Notes:
    """Labels, notes and lists in one file; may be shared by threads and by processes.

    Every method raises `Failure`, in a sentence, where the file is damaged, cannot be opened or
    written, or is held by another process for too long.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._store = NoteStore(self.path)

    # ------------------------------------------------------------------------------------ texts

    def note(self, sae: str, feature: int) -> Note:
        """The text that counts now; version 0 and empty where there is none."""
        with self._store.reading() as file:
            return _current(file, sae, operator.index(feature))

    def save(self, sae: str, feature: int, *, label: str, note: str, version: int) -> Note:
        """Save a text on top of the version that its writer has read; gives it as it is saved.

        Texts that are there already are not saved again.

        Raises `Conflict` where that version is not the latest and the latest says something else,
        `UserError` for texts that are too long or cannot be stored, or a feature below 0.
        """
        feature = checked_place(sae, feature)
        label, note = checked_label(label), checked_note(note)
        with self._store.writing() as file:
            theirs = _current(file, sae, feature)
            if (theirs.label, theirs.note) == (label, note):
                return theirs
            if theirs.version != version:
                raise Conflict(_meanwhile(sae, feature, theirs), theirs)
            saved = Note(label=label, note=note, version=version + 1, changed=_now())
            _insert(file, sae, feature, saved)
            return saved

    def history(self, sae: str, feature: int) -> list[Note]:
        """Every version of a feature's text, the first one first."""
        query = (
            "SELECT label, note, version, changed FROM versions "
            "WHERE sae = ? AND feature = ? ORDER BY version"
        )
        with self._store.reading() as file:
            rows = file.execute(query, (sae, operator.index(feature))).fetchall()
        return [_note(row) for row in rows]

    def labels(self, sae: str) -> dict[int, str]:
        """The label of every feature of an SAE that has one."""
        return {place[1]: text.label for place, text in self.latest(sae).items() if text.label}

    def latest(self, sae: str | None = None) -> dict[tuple[str, int], Note]:
        """What counts now, by SAE and feature; of one SAE, or of all where it is None."""
        where, asked = ("", ()) if sae is None else ("WHERE sae = ?", (sae,))
        with self._store.reading() as file:
            rows = file.execute(LATEST.format(where=where), asked).fetchall()
        return {(row[0], row[1]): _note(row[2:]) for row in rows}

    # ------------------------------------------------------------------------------------ lists

    def lists(self, sae: str | None = None) -> dict[str, int]:
        """Every list by name and its number of members; only members of one SAE where given."""
        where, asked = ("", ()) if sae is None else ("WHERE sae = ?", (sae,))
        query = f"SELECT list, count(*) FROM members {where} GROUP BY list ORDER BY list"
        with self._store.reading() as file:
            return dict(file.execute(query, asked).fetchall())

    def members(self, name: str) -> list[Member]:
        """The members of a list, in the order in which they came. Raises `UserError` for none."""
        query = "SELECT sae, feature, note FROM members WHERE list = ? ORDER BY place"
        with self._store.reading() as file:
            rows = file.execute(query, (name,)).fetchall()
        if not rows:
            there = ", ".join(map(repr, self.lists())) or "there is none yet"
            raise UserError(f"there is no list named {name!r}; lists are: {there}.")
        return [Member(sae=row[0], feature=row[1], note=row[2]) for row in rows]

    def lists_of(self, sae: str, feature: int) -> list[str]:
        """The lists that a feature is in, by name."""
        query = "SELECT list FROM members WHERE sae = ? AND feature = ? ORDER BY list"
        with self._store.reading() as file:
            return [row[0] for row in file.execute(query, (sae, operator.index(feature)))]

    def add(self, name: str, sae: str, feature: int, note: str = "") -> None:
        """Put a feature into a list, which need not be there yet; its note replaces an older one.

        Raises `UserError` for a name that is empty or too long.
        """
        member = Member(sae=sae, feature=checked_place(sae, feature), note=checked_note(note))
        name = checked_list(name)
        with self._store.writing() as file:
            _insert_members(file, name, [member], renew=True)

    def add_all(self, name: str, sae: str, features: Sequence[int]) -> int:
        """Put features into a list, all or none of them; gives how many were not in it before."""
        places = [checked_place(sae, feature) for feature in features]
        name, members = checked_list(name), [Member(sae=sae, feature=n, note="") for n in places]
        with self._store.writing() as file:
            return _insert_members(file, name, members, renew=True)

    def remove(self, name: str, sae: str, feature: int) -> None:
        """Take a feature out of a list; one that is not in it changes nothing."""
        query = "DELETE FROM members WHERE list = ? AND sae = ? AND feature = ?"
        with self._store.writing() as file:
            file.execute(query, (name, sae, operator.index(feature)))

    # ------------------------------------------------------------------------- from file to file

    def export(self) -> dict[str, Any]:
        """Everything, as the JSON document that `saes.note_files` defines."""
        texts = "SELECT sae, feature, label, note, version, changed FROM versions ORDER BY 1, 2, 5"
        members = "SELECT list, sae, feature, note FROM members ORDER BY list, place"
        with self._store.reading() as file:
            return write_document(
                [((row[0], row[1]), _note(row[2:])) for row in file.execute(texts)],
                [
                    (row[0], Member(sae=row[1], feature=row[2], note=row[3]))
                    for row in file.execute(members)
                ],
            )

    def load(self, document: Any) -> Merged:
        """Merge an exported document into this file, the whole of it or nothing.

        Of a text that differs, the one that was saved last counts; every other one stays in the
        history, or in the document where it is the older one. Lists gain members and lose none.

        Raises `UserError` where the document is not one of ours, saying what is wrong with it.
        """
        features, entries = read_document(document)
        with self._store.writing() as file:
            counts = Counter(_merge(file, place, texts) for place, texts in features.items())
            listed = sum(
                _insert_members(file, name, [member], renew=False) for name, member in entries
            )
        return Merged(
            added=counts["added"], updated=counts["updated"], kept=counts["kept"],
            same=counts["same"], listed=listed,
        )  # fmt: skip

    def export_labels(self, sae: str | None = None) -> str:
        """What counts now as a CSV table; of one SAE, or of all where it is None."""
        return labels_csv(self.latest(sae))

    def revision(self) -> int:
        """A number that grows with every change of anything here."""
        with self._store.reading() as file:
            return file.execute("SELECT number FROM revision").fetchone()[0]


def _current(file: sqlite3.Connection, sae: str, feature: int) -> Note:
    query = LATEST.format(where="WHERE sae = ? AND feature = ?")
    row = file.execute(query, (sae, feature)).fetchone()
    return _note(row[2:]) if row else Note()


def _note(row: Sequence[Any]) -> Note:
    label, note, version, changed = row
    return Note(label=label, note=note, version=version, changed=changed)


def _insert(file: sqlite3.Connection, sae: str, feature: int, text: Note) -> None:
    file.execute(
        "INSERT INTO versions (sae, feature, version, label, note, changed) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (sae, feature, text.version, text.label, text.note, text.changed),
    )


def _insert_members(
    file: sqlite3.Connection, name: str, members: Sequence[Member], *, renew: bool
) -> int:
    """Put features into a list; gives how many were not in it before.

    `renew` lets a note take the place of an older one; else it only fills an empty one.
    """
    count = "SELECT count(*) FROM members"
    (before,) = file.execute(count).fetchone()
    fits = "excluded.note NOT IN ('', members.note)" if renew else (
        "members.note = '' AND excluded.note != ''"
    )  # fmt: skip
    file.executemany(
        "INSERT INTO members (list, sae, feature, note) VALUES (?, ?, ?, ?) "
        f"ON CONFLICT DO UPDATE SET note = excluded.note WHERE {fits}",
        [(name, member.sae, member.feature, member.note) for member in members],
    )
    return file.execute(count).fetchone()[0] - before


def _merge(file: sqlite3.Connection, place: Place, versions: Sequence[Note]) -> str:
    """Bring a feature's versions in; gives which count of `Merged` it belongs to."""
    here, theirs = _current(file, *place), versions[-1]
    if here.version and (here.label, here.note) == (theirs.label, theirs.note):
        return "same"
    query = "SELECT label, note, changed FROM versions WHERE sae = ? AND feature = ?"
    known = set(file.execute(query, place).fetchall())
    older = here.version and _moment(theirs.changed) <= _moment(here.changed)
    if older or (theirs.label, theirs.note, theirs.changed) in known:
        return "kept"
    fresh = [text for text in versions if (text.label, text.note, text.changed) not in known]
    for number, text in enumerate(fresh, here.version + 1):
        _insert(file, *place, replace(text, version=number))
    return "updated" if here.version else "added"


def _meanwhile(sae: str, feature: int, theirs: Note) -> str:
    if not theirs.version:
        return f"what was written about feature {feature} of {sae} is gone; save again to write it."
    return (
        f"feature {feature} of {sae} was saved meanwhile, at {theirs.changed}, with the label "
        f"{theirs.label!r}; save again to put your text on top: every version is kept."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _moment(changed: str) -> datetime:
    return datetime.fromisoformat(changed)
