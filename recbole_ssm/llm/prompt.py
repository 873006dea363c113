"""LlamaRec's prompt as tokens: an instruction, the titles of a history, and lettered candidates.

Reference:
    Yue et al. "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking." arXiv 2311.02089, 2023, and
    its published code. The words are theirs. They tokenise each prompt as one text; here each title is tokenised once
    and prompts are put together from tokens, so that a token never reaches across the edge of a title.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import LETTERS

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


class Prompts:
    """Writes prompts.

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
        max_tokens: how many tokens a prompt and its answer may have together. A history that does not fit loses its
            oldest items; :attr:`shortened` counts how often, of :attr:`written` prompts.
        answer: ``letter`` or ``title``, what the model is asked for.

    Raises:
        UserError: more candidates than letters, a tokenizer that splits a letter, or no room for a single title of
            the history.
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
        if candidates > len(LETTERS):
            raise UserError(
                f"num_candidates: {candidates} are more than the {len(LETTERS)} letters that name them; "
                "try num_candidates: 20"
            )
        self.history, self.max_tokens, self.answer = history, max_tokens, answer
        self.shortened = self.written = 0

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        start = tokenizer("a")["input_ids"][:1]
        opening = encode(_opening("index letter" if answer == "letter" else "title"))
        self.prefix: list[int] = [*(start if start == [tokenizer.bos_token_id] else []), *opening]
        asked = LETTERS[:candidates] if answer == "letter" else ""
        self.letters = [_one_token(encode(letter), letter) for letter in asked]
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

    def _that_fit(self, history: list[int], room: int) -> list[int]:
        """The newest items whose lines have so many tokens at most together."""
        for number, item in enumerate(reversed(history)):
            room -= len(self._numbers[number]) + len(self.titles[item]) + (len(self._next) if number else 0)
            if room < 0:
                return history[len(history) - number :]
        return history


def _opening(answer: str) -> str:
    return OPENING.format(instruction=INSTRUCTION.format(answer=answer))


def _one_token(ids: list[int], letter: str) -> int:
    if len(ids) != 1:
        raise UserError(
            f"base_model: its tokenizer splits the letter {letter} into {len(ids)} tokens, and verbalizer: letters "
            "reads one; take verbalizer: title_likelihood, or another base model"
        )
    return ids[0]
