"""
LlamaRec
################################################
Reference:
    Zhenrui Yue et al. "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking." arXiv 2311.02089,
    2023. ORPO in place of its fine-tuning: arXiv 2408.05606, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.errors import UserError
from recbole_ssm.llm import preference
from recbole_ssm.llm.prompt import LETTERS, Prompts, Question, prompt_words
from recbole_ssm.llm.recommender import LanguageModelRecommender
from recbole_ssm.llm.reranking import Reranked, Reranking, fuse, target_ranks
from recbole_ssm.llm.retriever import check_retriever, find_retriever
from recbole_ssm.llm.verbalizer import Verbalizer
from recbole_ssm.model.registry import build_model
from recbole_ssm.trainer.hooks import Hook

TRAIN_CANDIDATES = ("random", "insert", "skip")
RERANK = ("all", "retrieved")
TUNED = "tuned"
FUSION_WEIGHTS = [step / 20 for step in range(21)]


class LlamaRec(LanguageModelRecommender):
    """LlamaRec lets a language model order the best items of a retriever, in one forward pass.

    The retriever is any sequential model; it is frozen here, and its weights lie beside the language model's in
    checkpoints. Scores are the retriever's: the same values are given to the same candidates, in the language model's
    order, so what is not among them stays where it is.

    Learning takes prefixes of the training part. ``train_candidates`` says what the item that came stands among:
    ``random`` items that the history does not hold, as LlamaRec's code has it; the retriever's best, the last of which
    makes room where it is missing (``insert``), or a row without a loss there (``skip``).

    In evaluation candidates stand in an order that depends on the seed, the history and the items, and not on their
    ranks; in training it is random. LlamaRec's code shows the retriever's order in evaluation.

    Args:
        config: the configuration.
        dataset: the training set, or as much of it as a checkpoint holds.
        retriever_settings: the configuration that the retriever is trained with; a checkpoint's ``config`` holds it.
    """

    fusion: Tensor

    first_stage = staticmethod(find_retriever)

    @staticmethod
    def check_options(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
        """Refuse what cannot work, before a retriever is trained for it.

        Raises:
            UserError: a value is impossible, or does not go with another.
        """
        check_retriever(options, find_model)
        if not 2 <= options["num_candidates"] <= len(LETTERS):
            raise UserError(
                f"num_candidates: must be from 2 to {len(LETTERS)}, as each candidate has a letter, got "
                f"{options['num_candidates']}; try num_candidates: 20"
            )
        weight = options["fusion_weight"]
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight not in (None, TUNED) and not (number and 0 <= weight <= 1):
            raise UserError(
                f"fusion_weight: must lie in [0, 1] or be '{TUNED}', got {weight!r}; try fusion_weight: 0.5"
            )
        if options["orpo_lambda"] < 0:
            raise UserError(f"orpo_lambda: must be 0 or more, got {options['orpo_lambda']}; try orpo_lambda: 0.1")
        three = options["train_objective"], options["verbalizer"], options["orpo_probabilities"]
        if three == ("orpo", "embedding", "vocabulary"):
            raise UserError(
                "orpo_probabilities: verbalizer: embedding has probabilities of candidates alone; "
                "take orpo_probabilities: letters"
            )
        mode = options["eval_args"]["mode"]
        if {*mode.values()} != {"full"} if isinstance(mode, Mapping) else mode != "full":
            raise UserError(f"eval_args: a ranker of retrieved items is evaluated with mode: full, got {mode!r}")

    def __init__(self, config: Any, dataset: Any, retriever_settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.num_candidates = min(config["num_candidates"], self.n_items - 1)
        self.train_candidates = config["train_candidates"]
        self.train_objective = config["train_objective"]
        self.orpo_lambda = config["orpo_lambda"]
        self.orpo_rejected = config["orpo_rejected"]
        self.orpo_probabilities = config["orpo_probabilities"]
        self.rerank = config["rerank"]
        self.seed = config["seed"]
        verbalizer = config["verbalizer"]
        if self.n_items < 3:
            raise UserError(f"num_candidates: a catalogue of {self.n_items - 1} items leaves nothing to rank")

        # define layers
        self.settings: dict[str, Any] = {"retriever_settings": retriever_settings or config["retriever_settings"]}
        retriever = build_model(self.settings["retriever_settings"], dataset, config["device"])
        self.retriever = retriever.eval().requires_grad_(False)
        # a prompt's titles have a space before them, and so should those that a random base's tokenizer learns from
        self.load_language_model(config, [*prompt_words(), *(f" {title}" for title in self.titles[1:])])
        self.prompts = Prompts(
            self.tokenizer,
            self.titles,
            history=config["prompt_history"],
            candidates=self.num_candidates,
            title_tokens=config["title_tokens"],
            max_tokens=min(config["prompt_tokens"], self.context),
            answer="title" if verbalizer == "title_likelihood" else "letter",
        )
        self.verbalizer = Verbalizer(self.language_model, self.prompts, verbalizer, config["prompt_batch_tokens"])
        weight = config["fusion_weight"]
        self.fusion_tuned = weight == TUNED
        self.register_buffer("fusion", torch.tensor(0.0 if self.fusion_tuned else float(weight or 0.0)))
        self.records: list[Reranked] | None = None  # where someone asks for them
        self.asked = 0  # users of whom the language model was asked, since someone set it to 0
        self._ready: dict[tuple[int, ...], Tensor] = {}  # found while tuning, for the evaluation that follows

    def train(self, mode: bool = True) -> LlamaRec:
        """As torch's; the retriever stays in evaluation mode."""
        if mode:
            self._ready.clear()
        super().train(mode)
        self.retriever.eval()
        return self

    def hooks(self) -> list[Hook]:
        """Besides those of every language model, the measurement of the orders of the candidates."""
        return [*super().hooks(), Reranking()]

    # --- RecBole's interface -----------------------------------------------------------------------------------------

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean loss over the rows of a batch; a row that is skipped counts as one without loss."""
        histories, candidates, target = self.candidates_to_learn_from(interaction)
        if not histories:
            return sum((p.sum() * 0.0 for p in self.language_model.parameters() if p.requires_grad), self.fusion * 0.0)
        questions = self.questions(histories, candidates)
        orpo = self.train_objective == "orpo"
        columns = target[:, None]  # whose likelihoods are computed: of a title each costs its tokens
        if self.verbalizer.kind != "title_likelihood" or (orpo and self._needs_all):
            columns = torch.arange(candidates.shape[1], device=target.device).expand_as(candidates)
        elif orpo:
            rejected = preference.choose_rejected(candidates, target, self.orpo_rejected)
            columns = torch.cat([columns, rejected], 1)
        if columns.shape[1] < candidates.shape[1]:
            asked = zip(questions, columns.tolist())
            questions = [q._replace(answers=[q.answers[column] for column in row]) for q, row in asked]
            target = torch.zeros_like(target)
        log_p = self.verbalizer.log_probabilities(questions)  # [B, columns]
        loss = -log_p.gather(1, target[:, None]).squeeze(1)
        if orpo:
            odds_of = log_p.log_softmax(-1) if self.orpo_probabilities == "letters" else log_p
            chosen = odds_of.gather(1, target[:, None]).squeeze(1)
            rejected = preference.choose_rejected(log_p, target, self.orpo_rejected)
            loss = preference.orpo_loss(loss, chosen, odds_of.gather(1, rejected), self.orpo_lambda)
        return loss.sum() / len(interaction)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, candidates: Tensor) -> Tensor:
        """Log-probabilities ``[B, C]`` of the language model over candidates ``[B, C]`` of histories ``[B, L]``."""
        histories = [row[:length] for row, length in zip(item_seq.tolist(), item_seq_len.tolist())]
        return self.verbalizer.scores(self.questions(histories, candidates)).log_softmax(-1)

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        scores = self._retrieve(interaction)
        best = scores.topk(self.num_candidates).indices
        histories, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        candidates = best.gather(1, shuffled(best, histories, self.seed).argsort(1))  # [B, C]
        values = scores.gather(1, candidates)
        retriever = values.log_softmax(-1)
        target = torch.full_like(lengths, -1)
        asked = torch.ones_like(lengths, dtype=torch.bool)
        if self.ITEM_ID in interaction.interaction:
            target = column_of(candidates, interaction[self.ITEM_ID])
            if self.rerank == "retrieved":  # the order of the candidates cannot change where the others' targets stand
                asked = target >= 0
        language = torch.full_like(retriever, torch.nan)
        if asked.any():
            language[asked] = self._answers(histories[asked], lengths[asked], candidates[asked]).to(language.dtype)
        if self.records is not None:
            self.records.append(Reranked(target.cpu(), language.cpu(), retriever.cpu()))
        order = fuse(language, retriever, float(self.fusion)).argsort(dim=1, descending=True, stable=True)
        order[~asked] = retriever[~asked].argsort(dim=1, descending=True, stable=True)
        return scores.scatter(1, candidates.gather(1, order), values.sort(1, descending=True).values)

    def _answers(self, item_seq: Tensor, item_seq_len: Tensor, candidates: Tensor) -> Tensor:
        """As :meth:`forward`, which is asked only for what tuning did not find."""
        histories = zip(item_seq.tolist(), item_seq_len.tolist())
        found = [self._ready.pop(tuple(row[:length]), None) for row, length in histories]
        missing = [number for number, answer in enumerate(found) if answer is None]
        self.asked += len(missing)
        if missing:
            fresh = self.forward(item_seq[missing], item_seq_len[missing], candidates[missing])
            for number, answer in zip(missing, fresh):
                found[number] = answer
        return torch.stack([answer.to(candidates.device) for answer in found if answer is not None])

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID][:, None]).squeeze(1)

    # --- candidates --------------------------------------------------------------------------------------------------

    def _retrieve(self, interaction: Any) -> Tensor:
        """The retriever's scores ``[B, V]``, minus infinity for the padding."""
        with torch.no_grad():
            scores = self.retriever.full_sort_predict(interaction)
        scores = scores.view(len(interaction[self.ITEM_SEQ_LEN]), -1)[:, : self.n_items].float().clone()
        scores[:, 0] = -torch.inf
        return scores

    def candidates_to_learn_from(self, interaction: Any) -> tuple[list[list[int]], Tensor, Tensor]:
        """Histories, candidates ``[B, C]`` in random order, the column of what came ``[B]``; skipped rows left out."""
        came = interaction[self.ITEM_ID]
        if self.train_candidates == "random":
            noise = torch.rand(len(came), self.n_items, device=came.device)
            noise.scatter_(1, interaction[self.ITEM_SEQ], -1.0)  # of the history only where the catalogue ends
            noise[:, 0] = -2.0
            noise.scatter_(1, came[:, None], 2.0)
            candidates = noise.topk(self.num_candidates).indices
        else:
            candidates = self._retrieve(interaction).topk(self.num_candidates).indices
            if self.train_candidates == "insert":
                missing = (candidates != came[:, None]).all(1)
                candidates[missing, -1] = came[missing]
        order = torch.rand(candidates.shape, device=came.device).argsort(1)
        candidates = candidates.gather(1, order)
        target = column_of(candidates, came)
        kept = target >= 0  # of all rows, but for train_candidates: skip
        lists, lengths = interaction[self.ITEM_SEQ][kept].tolist(), interaction[self.ITEM_SEQ_LEN][kept].tolist()
        return [row[:length] for row, length in zip(lists, lengths)], candidates[kept], target[kept]

    def questions(self, histories: list[list[int]], candidates: Tensor) -> list[Question]:
        """What is asked about histories of candidates ``[B, C]``."""
        titles = self.prompts.titles
        return [
            Question(self.prompts.write(history, items), [titles[item] for item in items])
            for history, items in zip(histories, candidates.tolist())
        ]

    @torch.no_grad()
    def tune(self, valid_data: Any) -> None:
        """Choose the fusion weight of the highest NDCG among validation rows, the least of those that are equal."""
        if not self.fusion_tuned:
            return
        self._ready.clear()
        self.records = []
        answers: dict[tuple[int, ...], Tensor] = {}
        for batch in valid_data:
            self.full_sort_predict(batch[0].to(self.fusion.device))
            for history, answer in zip(self.histories(batch[0]), self.records[-1].language):
                if not answer.isnan().any():
                    answers[tuple(history)] = answer
        self._ready = answers
        target, language, retriever = (torch.cat(column) for column in zip(*self.records))
        self.records = None
        found = target >= 0
        ranks = [target_ranks(fuse(language, retriever, w)[found], target[found]) for w in FUSION_WEIGHTS]
        gains = distributed.mean([float((1 / torch.log2(r + 1.0)).sum()) for r in ranks])
        self.fusion.fill_(FUSION_WEIGHTS[gains.index(max(gains))])

    @property
    def _needs_all(self) -> bool:
        return self.orpo_rejected != "random" or self.orpo_probabilities == "letters"


def column_of(candidates: Tensor, items: Tensor) -> Tensor:
    """Where in its row of candidates ``[B, C]`` an item ``[B]`` stands; -1 where it does not."""
    same = candidates == items[:, None]
    return torch.where(same.any(1), same.int().argmax(1), -1)


def shuffled(items: Tensor, histories: Tensor, seed: int) -> Tensor:
    """Numbers ``[B, C]`` to sort items ``[B, C]`` by: a hash of the seed, the history ``[B, L]`` and the item."""
    key = torch.full_like(histories[:, 0], seed)
    for column in histories.T:  # padding leaves the key as it is, so its width does not count
        key = torch.where(column > 0, _mix(key ^ column), key)
    return _mix(_mix(key)[:, None] ^ items)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), with an added constant, on int64 that wraps around."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
