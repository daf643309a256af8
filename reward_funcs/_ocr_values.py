"""How well the text read in a picture matches the text asked for: four measures on strings. No model in here.

    word_accuracy   share of the asked words that were read, each reading counted once
    ned             1 - edit distance / length of the longer text (normalised edit distance)
    flow_grpo       1 - edit distance / length of the asked text, clipped to [0, 1]; 1 if it is a part of what was read
                    (Flow-GRPO, flow_grpo/ocr.py)
    var_rl          completeness + similarity - 0.6 * character difference (VAR-RL, "VAR RL Done Right"); at most 2, and
                    -0.6 for a picture without text

`lines` are (text, confidence) in reading order, `texts` the quoted parts of the prompt. Upper and lower case are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

Lines = Sequence[tuple[str, float]]

DIFFERENCE_WEIGHT = 0.6  # VAR-RL, weight of the penalty


def words_of(texts: Sequence[str]) -> list[str]:
    """Lower-case words of the texts, split at blanks."""
    return [word for text in texts for word in text.lower().split()]


def word_accuracy(lines: Lines, texts: Sequence[str]) -> float:
    """Share of the asked words, as a multiset, among the words read."""
    asked, read = Counter(words_of(texts)), Counter(words_of([text for text, _ in lines]))
    return (asked & read).total() / asked.total()


def ned(lines: Lines, texts: Sequence[str]) -> float:
    """1 - edit distance / longer length, over all words joined by one blank: a line break costs nothing."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(" ".join(words_of([text for text, _ in lines])), " ".join(words_of(texts)))


def flow_grpo(lines: Lines, texts: Sequence[str]) -> float:
    """Flow-GRPO's reward, of the first quoted text alone, as published; blanks do not count, extra text costs nothing
    once the text is there."""
    from rapidfuzz.distance import Levenshtein

    asked, read = without_blanks(texts[:1]), without_blanks([text for text, _ in lines])
    distance = 0 if asked in read else Levenshtein.distance(read, asked)
    return 1 - min(distance, len(asked)) / len(asked)


def var_rl(lines: Lines, texts: Sequence[str]) -> float:
    """VAR-RL's reward; a word has the confidence s of its line.

    completeness = mean over asked words g of the lowest s among the readings equal to g (0 if there is none)
    similarity   = mean over asked words g of LD(g, p) * s of the reading p with the largest LD, the first of equals
    LD(x, y)     = 1 - edit distance / longer length
    difference   = characters that one side has and the other lacks / characters of both sides

    Why no text is below 0: it costs more than a wrong word, so that drawing nothing never pays.
    """
    from rapidfuzz.distance import Levenshtein

    asked = words_of(texts)
    read = [(word, confidence) for text, confidence in lines for word in words_of([text])]
    completeness = similarity = 0.0
    for word in asked:
        completeness += min((s for reading, s in read if reading == word), default=0.0)
        likeness = [(Levenshtein.normalized_similarity(word, reading), s) for reading, s in read]
        best, confidence = max(likeness, key=lambda pair: pair[0], default=(0.0, 0.0))
        similarity += best * confidence
    ours, theirs = Counter("".join(asked)), Counter("".join(word for word, _ in read))
    difference = ((ours - theirs) + (theirs - ours)).total() / (ours.total() + theirs.total())
    return (completeness + similarity) / len(asked) - DIFFERENCE_WEIGHT * difference


def without_blanks(texts: Sequence[str]) -> str:
    """The texts in lower case, one after the other, without any blank."""
    return "".join(words_of(texts))


MEASURES: dict[str, Callable[[Lines, Sequence[str]], float]] = {
    "flow_grpo": flow_grpo,
    "var_rl": var_rl,
    "word_accuracy": word_accuracy,
    "ned": ned,
}
