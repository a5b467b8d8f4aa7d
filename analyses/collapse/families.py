"""The prompt families of the collapse study, and the forms of prompt that they stand in.

Every family of Barbero et al. 2024 (arXiv 2406.04267, figures 3, 5 and 12, appendix C) as a row of
data: a question, then something repeated n times.
"""

from dataclasses import dataclass
from typing import Literal

from probe.errors import UserError

Form = Literal["raw", "bare", "question last", "chat", "shuffled"]
FORMS: dict[Form, str] = {
    "raw": "end of text, question, sequence",
    "bare": "the same without the end of text in front",
    "question last": "how to answer, then the question, then the sequence",
    "chat": "the chat template, which ends behind the sequence",
    "shuffled": "the question's tokens in random order",
}
SEVERAL_TOKENS = 3
"""A family whose repetitions are several tokens goes up to a third of the longest length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is repeated, behind which questions."""

    name: str
    """What it is called."""
    line: str
    """What it is, in a few words."""
    questions: tuple[str, ...]
    """Questions to put in front, up to where the sequence begins; the first is the paper's."""
    pieces: tuple[str, ...]
    """The sequence's pieces, over and over; each a repetition."""
    first: str = ""
    """The first repetition, where it differs."""
    random: bool = False
    """The sequence is of random digits instead, and ends in the piece, once or twice."""

    @property
    def repeats_last(self) -> bool:
        """Whether one more repetition is the last token once more, as the theorem wants it."""
        return len(self.pieces) == 1 and not self.first and not self.random

    def longest(self, n: int) -> int:
        """Repetitions of its longest prompt where those of one token go up to n: a third where
        repetitions are several tokens."""
        return n // SEVERAL_TOKENS if self.pieces[0].count(" ") > 1 else n


COUNTING = (
    "How many ones are in the following sequences? ",
    "Count the ones in this sequence: ",
    "Please tell me the number of ones here: ",
    "Sequence: ",
    "A row of digits, to be counted by the reader: ",
)
COPYING = (
    "Can you copy the following number? ",
    "Repeat this number: ",
    "Write down the number that follows: ",
    "Number: ",
    "The customer's number, as it was dictated: ",
)
SUMS = (
    "Can you perform the following sum? ",
    "Add up: ",
    "What is ",
    "Sum: ",
    "The bill, item by item: ",
)
WORDS = (
    'How often does the word "car" appear in the following sentence?',
    'Count the word "car" in this text:',
    "Sentence:",
    "He only said one word, again and again:",
    "Text:",
)
FAMILIES = (
    Family(name="ones", line="how many ones, 1111", questions=COUNTING, pieces=("1",)),
    Family(
        name="digits", line="random digits ending in 1 or 11", questions=COUNTING, pieces=("1",),
        random=True,
    ),
    Family(name="copying", line="copy the number, 1111", questions=COPYING, pieces=("1",)),
    Family(
        name="commas", line="copy the number, 111,111", questions=COPYING,
        pieces=(",1", "1", "1"), first="1",
    ),
    Family(name="sum", line="1 + 1 + 1", questions=SUMS, pieces=(" + 1",), first="1"),
    Family(name="words", line="car car car", questions=WORDS, pieces=(" car",)),
)  # fmt: skip
"""Figure 5 (a) to (d), then figure 3's sums and words."""


def find_family(name: str) -> Family:
    """The family of that name. Raises `UserError` where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"{name!r} is no prompt family; wanted one of {names}.")
