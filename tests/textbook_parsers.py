"""Lempel and Ziv's parsings as textbooks have them: slow, and plain to read."""


def words_76(text: str) -> int:
    """The textbook's exhaustive history, by substring search."""
    at = words = 0
    while at < len(text):
        size = 1
        while at + size <= len(text) and text[at : at + size] in text[: at + size - 1]:
            size += 1
        words, at = words + 1, at + size
    return words


def phrases_78(text: str) -> int:
    """The textbook's dictionary."""
    known, phrase, phrases = set(), "", 0
    for symbol in text:
        phrase += symbol
        if phrase not in known:
            known.add(phrase)
            phrase, phrases = "", phrases + 1
    return phrases + bool(phrase)
