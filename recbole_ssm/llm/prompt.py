"""LlamaRec's prompt as tokens: an instruction, the titles of a history, and lettered candidates.

Reference:
    Yue et al. "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking."
    arXiv 2311.02089, 2023, and its published code. The words are theirs. They tokenise each
    prompt as one text; here each title is tokenised once and prompts are put together from
    tokens, so that a token never reaches across the edge of a title.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any, NamedTuple

from recbole_ssm.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = "Given user history in chronological order, recommend an item from the candidate pool with its {answer}."
OPENING = "### Instruction:\n{instruction}\n\n### Input:\nUser history:"
POOL = "; \n Candidate pool:"
RESPONSE = "\n\n### Response:\n"
NEXT = " \n"


def prompt_words() -> list[str]:
    """Texts with the words of every prompt, for a tokenizer that is yet to be trained."""
    numbers = "".join(f" ({number})" for number in range(1, 21))
    letters = "".join(f" ({letter})" for letter in LETTERS)
    return [_opening("index letter"), _opening("title"), POOL, RESPONSE, NEXT, numbers, letters]


@dataclass
class Counts:
    """How many prompts were written since :func:`tell_of_shortened` was called."""

    written: int = 0
    shortened: int = 0
    """Those among them whose history lost its oldest titles, because it was too long to be read."""
    limit: str = "the base model reads"
    """What they were longer than."""


class Question(NamedTuple):
    """What is asked of the model about one user."""

    prompt: list[int]
    """The prompt's tokens after the prefix."""
    answers: list[list[int]]
    """The tokens of each candidate's title, in the order of the letters."""


class Prompts(Counts):
    """Writes prompts, and counts them.

    ::

        ### Instruction:
        Given user history in chronological order, recommend an item from the candidate pool with its index letter.

        ### Input:
        User history: (1) Title
         (2) Title ...;
         Candidate pool: (A) Title
         (B) Title ...

        ### Response:

    What stands before the first title is the same in every prompt: :attr:`prefix`.

    Args:
        tokenizer: a tokenizer of transformers'.
        titles: the titles by item id.
        history: how many items of a history are shown at most, the newest.
        candidates: how many candidates a prompt has at most.
        title_tokens: where a longer title is cut.
        max_tokens: how many tokens a prompt and its answer may have together. A history that
            does not fit loses its oldest items.
        answer: ``letter`` or ``title``, what the model is asked for.

    Raises:
        UserError: more candidates than letters, a tokenizer that splits a letter, or no room
            for a single title of the history.
    """

    def __init__(
        self,
        tokenizer: Any,
        titles: Sequence[str],
        *,
        history: int,
        candidates: int,
        title_tokens: int,
        max_tokens: int,
        answer: str = "letter",
    ) -> None:
        super().__init__(limit="the base model or prompt_tokens allow")
        if candidates > len(LETTERS):
            raise UserError(
                f"num_candidates: {candidates} are more than the {len(LETTERS)} letters that name them; "
                "try num_candidates: 20"
            )
        self.history, self.max_tokens, self.answer = history, max_tokens, answer

        encode = piece_encoder(tokenizer)
        self.prefix: list[int] = start_of_text(tokenizer, _opening("index letter" if answer == "letter" else "title"))
        self._letters = [encode(letter) for letter in LETTERS[:candidates]]
        self.titles: list[list[int]] = [ids[:title_tokens] for ids in map(encode, (f" {title}" for title in titles))]
        self._numbers = [encode(f" ({number})") for number in range(1, history + 1)]
        self._marks = [encode(f" ({letter})") for letter in LETTERS[:candidates]]
        self._next, self._pool, self._response = encode(NEXT), encode(POOL), encode(RESPONSE)
        longest = max(map(len, self.titles))
        answered = 1 if answer == "letter" else longest
        fixed = len(self.prefix) + len(self._pool) + len(self._response) + answered
        pool = sum(len(mark) + longest + len(self._next) for mark in self._marks)
        if fixed + pool + len(self._numbers[0]) + longest > max_tokens:
            raise UserError(
                f"prompt_tokens: {candidates} candidates of up to {longest} tokens leave no room for a history in "
                f"{max_tokens} tokens; try fewer num_candidates, a smaller title_tokens, or a base model that "
                "reads more"
            )
        self._room = max_tokens - fixed

    @property
    def letters(self) -> list[int]:
        """The tokens of the letters, in the order of the candidates.

        Raises:
            UserError: the tokenizer splits one, or has one token for two.
        """
        for ids, letter in zip(self._letters, LETTERS):
            found = f"splits the letter {letter} into {len(ids)} tokens" if len(ids) != 1 else ""
            if self._letters.count(ids) > 1:
                found = found or f"has one token for {letter} and another letter"
            if found:
                raise UserError(
                    f"base_model: its tokenizer {found}, and verbalizer: letters reads one token each; take "
                    "verbalizer: title_likelihood, or another base model"
                )
        return [ids[0] for ids in self._letters]

    def write(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """The tokens of one prompt after :attr:`prefix`.

        Args:
            history: item ids, oldest first; the newest are shown.
            candidates: item ids in the order of their letters.
        """
        pool: list[int] = []
        for number, (mark, item) in enumerate(zip(self._marks, candidates)):
            pool += [*(self._next if number else ()), *mark, *self.titles[item]]
        recent = list(history)[-self.history :]
        shown = self._that_fit(recent, self._room - len(pool))
        self.written += 1
        self.shortened += len(shown) < len(recent)
        tokens: list[int] = []
        for number, (mark, item) in enumerate(zip(self._numbers, shown)):
            tokens += [*(self._next if number else ()), *mark, *self.titles[item]]
        return [*tokens, *self._pool, *pool, *self._response]

    def examples(self) -> list[Question]:
        """Two made-up questions of the longest titles, with the longest history and the shortest; they are not
        counted.
        """
        counts = self.written, self.shortened
        longest = sorted(range(1, len(self.titles)), key=lambda item: len(self.titles[item]), reverse=True)
        items = [longest[number % len(longest)] for number in range(len(self._marks) + self.history)]
        candidates, items = items[: len(self._marks)], items[len(self._marks) :]
        # Two candidates tell as much as all of them.
        answers = [self.titles[item] for item in candidates[:2]]
        found = [Question(self.write(shown, candidates), answers) for shown in (items, items[:1])]
        self.written, self.shortened = counts
        return found

    def _that_fit(self, history: list[int], room: int) -> list[int]:
        """The newest items of a history whose lines fit into so many tokens."""
        for number, item in enumerate(reversed(history)):
            room -= len(self._numbers[number]) + len(self.titles[item]) + (len(self._next) if number else 0)
            if room < 0:
                return history[len(history) - number :]
        return history


def _opening(answer: str) -> str:
    return OPENING.format(instruction=INSTRUCTION.format(answer=answer))


def tell_of_shortened(counts: Counts) -> None:
    """Log how many prompts were shortened, if any, and start to count at 0."""
    if counts.shortened:
        getLogger().warning(
            f"{counts.shortened} of {counts.written} prompts were longer than {counts.limit}, and lost the oldest "
            "titles of their history"
        )
    counts.written = counts.shortened = 0


def start_of_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that begins a prompt, after the token that begins a text where the
    tokenizer has one.
    """
    begin = tokenizer("a")["input_ids"][:1]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*begin, *ids] if begin == [tokenizer.bos_token_id] else ids


def piece_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from a piece of a text to the tokens that it has within the text.

    Tokenizers of SentencePiece's kind, Llama-2's among them, put a space before whatever they
    encode. So a piece is encoded behind a line break, whose tokens are then taken off. What reads
    like a special token, such as the end of the text, is plain text here.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    anchor = encode("\n")
    if not tokenizer.convert_ids_to_tokens(encode("x"))[0].startswith("\N{LOWER ONE EIGHTH BLOCK}"):
        return encode

    def encode_within(text: str) -> list[int]:
        ids = encode(f"\n{text}")
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(text)

    return encode_within
