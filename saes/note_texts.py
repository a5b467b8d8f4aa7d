"""What a person can write about a feature, and what of it can be stored."""

import operator
from dataclasses import dataclass

from probe.errors import UserError

LABEL_LENGTH, NOTE_LENGTH, LIST_LENGTH, SAE_LENGTH = 200, 20_000, 80, 255
"""The most characters of a label, a note, the name of a list, the name of an SAE."""
FEATURES = 2**31
"""Features are numbered below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a person wrote about a feature, as of one version."""

    label: str = ""
    """What the feature is called, in one line; empty for none."""
    note: str = ""
    """Anything more to say about it."""
    version: int = 0
    """Counts up from 1 with every save; 0 where nothing was saved yet."""
    changed: str = ""
    """When it was saved, in UTC as ISO 8601; empty for version 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A feature in a list."""

    sae: str
    """Name of the SAE's folder."""
    feature: int
    """The feature's number."""
    note: str
    """Why it is in this list; may be empty."""


def checked_label(text: str) -> str:
    """A label as it is stored: in one line. Raises `UserError` where it is too long."""
    return _checked("a label", " ".join(text.split()), LABEL_LENGTH)


def checked_note(text: str) -> str:
    """A note as it is stored. Raises `UserError` where it is too long."""
    return _checked("a note", text.replace("\r\n", "\n").strip(), NOTE_LENGTH)


def checked_list(name: str) -> str:
    """A list's name as it is stored. Raises `UserError` where it is empty or too long."""
    name = " ".join(name.split())
    if not name:
        raise UserError("a list needs a name; got an empty one.")
    return _checked("a list's name", name, LIST_LENGTH)


def _checked(what: str, text: str, longest: int) -> str:
    if len(text) > longest:
        raise UserError(
            f"{what} has {longest:,} characters at most; got {len(text):,}: shorten it."
        )
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{what} holds a character that is no text; type it again without it.")
    return text


def checked_place(sae: str, feature: int) -> int:
    """A feature's number as it is stored. Raises `UserError` where it cannot be one."""
    number = operator.index(feature)
    if not 0 <= number < FEATURES or not sae:
        raise UserError(
            f"a feature is a number from 0 of an SAE that has a name; got {number} of {sae!r}."
        )
    _checked("the name of an SAE", sae, SAE_LENGTH)
    return number
