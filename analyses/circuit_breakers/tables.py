def figures(m):
    return {}


def numbers(m):
    return {}


def verdicts(m):
    return []


def tables(m):
    return {}


def text(m):
    return "x"
