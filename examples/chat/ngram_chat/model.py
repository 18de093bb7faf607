"""The language model: counts of word sequences, sampled with back-off.

Theory: an order-*n* Markov model over words ("stupid back-off", Brants et al. 2007, without scores because sampling
needs only one distribution at a time). The next word is drawn from the counts seen after the longest known context;
where a context was seen with one continuation only, the next shorter one is used half of the time, so that a small
corpus is not recited word by word.

Invariant: the same model file, prompt and seed give the same words on every machine and Python version.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ORDER = 4
END = "\n"  # the token between sentences; never a word, since words hold no white space
_WORD = re.compile(r"[A-Za-z0-9]+(?:['._/-][A-Za-z0-9]+)*|[.,;:!?]")
_CLOSES_SENTENCE = frozenset(".!?")
_STICKS_TO_WORD_BEFORE = frozenset(".,;:!?")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_FENCE = re.compile(r"```.*?```|~~~.*?~~~", re.DOTALL)
_NOT_PROSE = re.compile(r"^\s*(\||#|[-+=*]{3,}|<|\[!|\$ )")  # tables, headings, rules, HTML, badges, shell lines
_FORMAT_VERSION = 1


class ModelFileError(ValueError):
    """A model file that this version cannot read."""


class NgramModel:
    """Continuation counts of every context of 0 to ``ORDER - 1`` words.

    Args:
        counts: context (words joined by one space) to continuation to how often it was seen.
    """

    def __init__(self, counts: dict[str, dict[str, int]]) -> None:
        self._tables = {
            context: (tuple(after), tuple(_running_sum(after.values()))) for context, after in counts.items()
        }
        self._counts = counts
        self.vocabulary_size = len(counts.get("", {}))

    @classmethod
    def train(cls, texts: Iterable[str]) -> "NgramModel":
        """Return a model of all sentences in *texts* (Markdown or plain)."""
        counts: dict[str, dict[str, int]] = {}
        for text in texts:
            for sentence in sentences(text):
                padded = [END] * (ORDER - 1) + sentence + [END]
                for position in range(ORDER - 1, len(padded)):
                    for length in range(ORDER):
                        context = " ".join(padded[position - length : position])
                        after = counts.setdefault(context, {})
                        after[padded[position]] = after.get(padded[position], 0) + 1
        if not counts:
            raise ValueError("no sentence found to learn from: give at least one text file with prose in it")
        return cls(counts)

    def save(self, path: Path) -> None:
        """Write the model as JSON; `load` reads it back."""
        document = {"format": _FORMAT_VERSION, "order": ORDER, "counts": self._counts}
        path.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "NgramModel":
        """Return the model that `save` wrote.

        Raises:
            ModelFileError: the file is of another format or order.
        """
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") != _FORMAT_VERSION or document.get("order") != ORDER:
            raise ModelFileError(f"{path} holds another model format; train it again")
        return cls(document["counts"])

    def pieces(self, prompt: str, *, max_pieces: int, temperature: float, rng: random.Random) -> Iterator[str]:
        """Yield the answer to *prompt* piece by piece; joined, the pieces are the text.

        Ends after *max_pieces*, or at the end of a sentence once half of them are out. *temperature* 0 takes the
        commonest continuation each time, 1 draws as seen, above 1 flattens.
        """
        history = self._opening(prompt)
        first = True
        for produced in range(max_pieces):
            word = self._next_word(history, temperature, rng)
            if first and word in _STICKS_TO_WORD_BEFORE:  # an answer does not begin with a comma
                word = END
            if word == END and not first and produced * 2 >= max_pieces:
                return
            if word == END:
                history = [END] * (ORDER - 1)
                word = self._next_word(history, temperature, rng, allow_end=False)
            history = [*history[1:], word]
            glued = first or word in _STICKS_TO_WORD_BEFORE
            first = False
            yield word if glued else " " + word

    def _opening(self, prompt: str) -> list[str]:
        """Return where to start: the prompt's last words that the corpus knows, else a new sentence."""
        words = [word for word in _WORD.findall(prompt) if word not in _STICKS_TO_WORD_BEFORE]
        for length in range(min(ORDER - 1, len(words)), 0, -1):
            for stop in range(len(words), length - 1, -1):
                tail = words[stop - length : stop]
                if " ".join(tail) in self._tables:
                    return [END] * (ORDER - 1 - length) + tail
        return [END] * (ORDER - 1)

    def _next_word(
        self, history: Sequence[str], temperature: float, rng: random.Random, *, allow_end: bool = True
    ) -> str:
        for length in range(ORDER - 1, -1, -1):
            table = self._tables.get(" ".join(history[ORDER - 1 - length :]))
            if table is None:
                continue
            words, sums = table
            if len(words) == 1 and length > 1 and (words[0] == END or rng.random() < 0.5):
                continue
            word = _draw(words, sums, temperature, rng)
            if allow_end or word != END:
                return word
        return "."


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the sentences of *text* as lists of words and marks, without code blocks, tables and headings."""
    text = _LINK.sub(r"\1", _FENCE.sub("\n\n", text))
    prose = "\n".join("" if _NOT_PROSE.match(line) else line.strip(" *->") for line in text.splitlines())
    for paragraph in re.split(r"\n\s*\n", prose):
        sentence: list[str] = []
        for token in _WORD.findall(paragraph.replace("`", " ")):
            sentence.append(token)
            if token in _CLOSES_SENTENCE:
                if len(sentence) > 3:
                    yield sentence
                sentence = []


def _running_sum(values: Iterable[int]) -> Iterator[int]:
    total = 0
    for value in values:
        total += value
        yield total


def _draw(words: tuple[str, ...], sums: tuple[int, ...], temperature: float, rng: random.Random) -> str:
    """Return one of *words*; *sums* are the running sums of their counts."""
    if temperature <= 0:
        counts = [after - before for before, after in zip((0, *sums), sums, strict=False)]
        return words[max(range(len(words)), key=counts.__getitem__)]
    # 1.0 is the common case and needs no new weights; random.choices bisects the running sums.
    if temperature == 1.0:
        return rng.choices(words, cum_weights=sums)[0]
    counts = [after - before for before, after in zip((0, *sums), sums, strict=False)]
    return rng.choices(words, weights=[count ** (1.0 / temperature) for count in counts])[0]
