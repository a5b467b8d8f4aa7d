"""A rule in words: the short phrase that a person reads.

    "river" and its forms            digits, "number"             words ending in "-ing"
    "bank" in text with "river"      after "of the"               before "."
    lower-case words after "to"      pieces inside a word

A phrase names at most `SHOWN` words of a part and says how many more there are; the rule itself
names them all.
"""

from saes.label_rules import Part, Rule
from saes.label_words import Words

SHOWN = 3
"""Words of a part that a phrase names."""
LINE_BREAK = "\u21b5"


def phrase(rule: Rule, words: Words, *, weak: bool = False) -> str:
    """The label of a rule; a weak one also names what the feature promotes."""
    parts = []
    if rule.tokens is not None:
        parts.append(part_phrase(rule.tokens, words))
    if rule.after is not None:
        parts.append("after " + part_phrase(rule.after, words, neighbour=True))
    if rule.before is not None:
        promotes = rule.promotes and set(words.ids(rule.promotes)) == {
            token for token, _ in rule.before.tokens
        }
        named = "what it promotes, " if promotes else ""
        parts.append("before " + named + part_phrase(rule.before, words, neighbour=True))
    if rule.context is not None:
        parts.append("in text with " + part_phrase(rule.context, words, neighbour=True))
    said = " ".join(parts) or "no rule found"
    if weak and rule.promotes:
        said += "; promotes " + listed([quoted(token) for token in rule.promotes[:SHOWN]])
    return said


def part_phrase(part: Part, words: Words, *, neighbour: bool = False) -> str:
    """One condition in words: kinds first, then words by weight."""
    said = list(part.kinds)
    said += ["".join(f'words ending in "-{ending}"') for ending in part.endings]
    said += [f'words beginning with "{beginning}-"' for beginning in part.beginnings]
    said += [quoted("".join(words.texts[token] for token in pair)) for pair in part.phrases]
    groups = word_groups(part, words)
    named = [group_phrase(tokens, words, forms=not neighbour) for tokens in groups[: max(SHOWN, 1)]]
    if len(groups) == 1 and not said:
        return named[0]
    bare = [group_phrase(tokens, words, forms=False) for tokens in groups[:SHOWN]]
    more = len(groups) - len(bare)
    return listed(said + list(dict.fromkeys(bare))) + (f" and {more} more" if more > 0 else "")


def word_groups(part: Part, words: Words) -> list[list[int]]:
    """The part's tokens, forms of a word together, by weight."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for token, weight in part.tokens:
        groups.setdefault(int(words.stems[token]), []).append((token, weight))
    ordered = sorted(groups.values(), key=lambda group: -sum(weight for _, weight in group))
    return [[token for token, _ in sorted(group, key=lambda pair: -pair[1])] for group in ordered]


def group_phrase(tokens: list[int], words: Words, *, forms: bool) -> str:
    """A word, and that its other forms count too where they do."""
    several = len({words.bare[token] for token in tokens}) > 1
    shown = words.texts[tokens[0]]
    inside = words.spaced and shown.isalpha() and shown.islower()
    text = quoted(f"-{shown}" if inside else shown)
    return f"{text} and its forms" if several and forms else text


def quoted(text: str) -> str:
    """A token as it is read: in quotes, its outer spaces off, line breaks as arrows."""
    shown = text.replace("\n", LINE_BREAK).strip() or text.replace(" ", "\u00b7")
    return f'"{shown}"'


def listed(items: list[str]) -> str:
    """Items with commas."""
    return ", ".join(items)
