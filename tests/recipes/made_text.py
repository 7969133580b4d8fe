"""Text made up for the tests of recipes."""

import json


WORDS = "the quick brown fox jumps over a lazy dog while one old cat sleeps".split()


def text(seed, words=12):
    return " ".join(WORDS[(seed * 7 + place * (1 + seed % 5)) % len(WORDS)] for place in range(words))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
