"""RecBole's SequentialRecommender over a language model: what LlamaRec and GPT4Rec share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_ssm.config import Configurable
from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import RANDOM, load_base_model
from recbole_ssm.llm.hooks import ShortenedPrompts, TuneOnValidation
from recbole_ssm.llm.titles import titles_of
from recbole_ssm.trainer.hooks import Hook


class LanguageModelRecommender(Configurable, SequentialRecommender):
    """What LlamaRec and GPT4Rec share: titles, the base model, and checkpoints without the weights that stay frozen.

    ``state_dict`` leaves out the frozen parameters of ``language_model`` and keeps all else.
    ``base_digest`` goes with it, and a checkpoint that was trained on another base model is
    refused.

    A model calls :meth:`load_language_model` in its ``__init__``; then ``language_model``,
    ``tokenizer`` and ``context`` are there, as ``titles`` is from the start.
    """

    input_type = InputType.POINTWISE
    reads_text = True
    language_model: Any
    base_digest: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self._ready: dict[Hashable, Any] = {}
        self._kept: dict[Hashable, Any] | None = None
        self.titles = titles_of(dataset, config)
        if len(self.titles) != self.n_items:
            raise UserError(f"titles: {len(self.titles)} of them for {self.n_items} items; the data is not the model's")

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A prompt has one answer."""
        return f"{config['model']} reads a history as one text"

    def load_language_model(self, config: Any, prompt_texts: Sequence[str] = ()) -> None:
        """Load the base model; ``prompt_texts`` are words that a random base's tokenizer should
        know besides titles.
        """
        base = load_base_model(config, [*self.titles[1:], *prompt_texts])
        self.language_model, self.tokenizer, self.context = base.model, base.tokenizer, base.context
        self.base_name = base.name
        plain = base.model.get_base_model() if hasattr(base.model, "get_base_model") else base.model
        self._takes_positions = "position_ids" in inspect.signature(plain.forward).parameters
        self.register_buffer("base_digest", torch.tensor(list(bytes.fromhex(base.digest)), dtype=torch.uint8))
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_pre_hook(_check_base)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    def histories(self, interaction: Any) -> list[list[int]]:
        """The item ids of each row's history, oldest first, without padding."""
        return histories_of(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    def train(self, mode: bool = True) -> LanguageModelRecommender:
        """As of any module; answers that were found before are forgotten."""
        if mode:
            self._ready.clear()
        super().train(mode)
        return self

    def remembered(
        self,
        questions: Sequence[Hashable],
        compute: Callable[[list[int]], Iterable[Any]],
    ) -> list[Any]:
        """The language model's answers: those that :meth:`remembering` has kept, each for one evaluation, or new ones.

        Args:
            questions: all that each answer depends on.
            compute: takes the positions of the questions that have no answer yet, and gives
                their answers.
        """
        found = [self._ready.pop(question, None) for question in questions]
        missing = [number for number, answer in enumerate(found) if answer is None]
        if missing:
            for number, answer in zip(missing, compute(missing)):
                found[number] = answer
        if self._kept is not None:
            self._kept.update(zip(questions, found))
        return found

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the answers that are found meanwhile, for the evaluation that follows."""
        self._ready.clear()
        self._kept = {}
        try:
            yield
            self._ready = self._kept
        finally:
            self._kept = None

    def hooks(self) -> list[Hook]:
        """What the trainer calls beside training."""
        return [TuneOnValidation(), ShortenedPrompts()]

    def tune(self, valid_data: Any) -> None:
        """Choose on the validation rows what training does not learn; called before each validation, in eval mode.

        Where no validation is to come it is called once before training; ``valid_data`` may have no
        rows then, or be None.
        What is chosen is kept in buffers, and so in checkpoints. In a run of several processes
        each sees its share of the rows, and all must come to the same choice. By default there
        is nothing to choose.
        """


def histories_of(item_seq: Tensor, item_seq_len: Tensor) -> list[list[int]]:
    """The item ids of padded histories ``[B, L]`` of lengths ``[B]``, oldest first, without padding."""
    return [row[:length] for row, length in zip(item_seq.tolist(), item_seq_len.tolist())]


def _frozen_names(module: Any) -> set[str]:
    """Names, as in state_dict, of what is frozen in the language model."""
    return {
        f"language_model.{name}"
        for name, tensor in module.language_model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "requires_grad", False)
    }


def _drop_frozen(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in _frozen_names(module):
        state.pop(prefix + name, None)


def _check_base(module: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    saved = state.get(f"{prefix}base_digest")
    if saved is not None and saved.tolist() != module.base_digest.tolist():
        cause = "its *.safetensors or its tokenizer differ); name the same base model"
        if module.base_name == RANDOM:
            cause = "it is made of the titles, random_base_args and seed, which differ); bring the former ones back"
        raise UserError(f"base_model: {module.base_name} is not what this checkpoint was trained on ({cause}")


def _expect_no_frozen(module: Any, keys: Any) -> None:
    frozen = _frozen_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]
