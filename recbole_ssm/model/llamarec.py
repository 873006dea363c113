"""
LlamaRec
################################################
Reference:
    Zhenrui Yue et al. "LlamaRec: Two-Stage Recommendation using Large Language Models for
    Ranking." arXiv 2311.02089, 2023. ORPO in place of its fine-tuning: arXiv 2408.05606, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.errors import UserError
from recbole_ssm.evaluation.metrics import OF_ITEMS
from recbole_ssm.evaluation.ranks import Scorer
from recbole_ssm.llm import preference
from recbole_ssm.llm.model import LanguageModelRecommender, histories_of
from recbole_ssm.llm.prompt import Prompts, Question, prompt_words
from recbole_ssm.llm.reranking import Reranked, Reranking, fuse, target_ranks
from recbole_ssm.llm.retriever import check_retriever, find_retriever
from recbole_ssm.llm.verbalizer import Verbalizer
from recbole_ssm.model.registry import build_model
from recbole_ssm.trainer.hooks import Hook

TUNED = "tuned"
FUSION_WEIGHTS = [step / 20 for step in range(21)]


class LlamaRec(LanguageModelRecommender):
    """LlamaRec lets a language model order the best items of a retriever, in one forward pass.

    The retriever is any sequential model. It is frozen here, and its weights lie beside the
    language model's in checkpoints. The scores are the retriever's: the candidates share their
    values out among themselves, in the order of the language model, so all other items stay
    where they are. Where values are equal, those of candidates are raised by the least steps that
    part them.

    Training rows are prefixes of the training part. ``train_candidates`` says which candidates
    surround the item that came. ``random``: items that the history does not hold, as in
    LlamaRec's code. ``insert``: the retriever's best, of which the last one makes room where
    the item is missing. ``skip``: the same, but such rows have no loss.

    In training the candidates stand in random order. In evaluation their order depends on the
    seed, the history and the items, and not on their ranks; LlamaRec's code shows the
    retriever's order there.

    Args:
        config: the configuration.
        dataset: the training set, or as much of it as a checkpoint holds.
        retriever_settings: the configuration that the retriever is trained with; None takes it
            from ``config``, as a checkpoint holds it there.
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
        three = options["train_objective"], options["verbalizer"], options["orpo_probabilities"]
        if three == ("orpo", "embedding", "vocabulary"):
            raise UserError(
                "orpo_probabilities: verbalizer: embedding has probabilities of candidates alone; "
                "take orpo_probabilities: letters"
            )
        metrics = options["metrics"]
        of_items = [m for m in ([metrics] if isinstance(metrics, str) else metrics) if m.lower() in OF_ITEMS]
        if options["rerank"] == "retrieved" and of_items:
            raise UserError(
                f"rerank: the language model must order every user's items for {of_items[0]}; take rerank: all, or "
                "metrics of ranks alone"
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
        # Titles have a space before them in a prompt, so a tokenizer that is yet to be trained
        # should see them so.
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
        # The hook Reranking sets these two at the start of an evaluation: what every batch
        # looked like, and for how many users the language model was run.
        self.records: list[Reranked] | None = None
        self.asked = 0

    @property
    def time_encoding(self) -> Any:
        """What the retriever reads of times; None where it reads none."""
        return getattr(self.retriever, "time_encoding", None)

    def train(self, mode: bool = True) -> LlamaRec:
        """As of any module, but the retriever stays in evaluation mode."""
        super().train(mode)
        self.retriever.eval()
        return self

    def hooks(self) -> list[Hook]:
        """Besides those of every language model, the measurement of the orders of the
        candidates.
        """
        return [*super().hooks(), Reranking()]

    # --- RecBole's interface ---

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean loss over the rows of a batch; a row that is skipped counts as one without loss."""
        histories, candidates, target = self.candidates_to_learn_from(interaction)
        if not histories:
            return sum((p.sum() * 0.0 for p in self.language_model.parameters() if p.requires_grad), self.fusion * 0.0)
        questions = self.questions(histories, candidates)
        orpo = self.train_objective == "orpo"
        # The columns whose likelihoods are computed. Titles cost their tokens, so only those
        # that count are taken.
        columns = target[:, None]
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
        """Log-probabilities ``[B, C]`` of the language model over candidates ``[B, C]`` of
        histories ``[B, L]``.
        """
        histories = histories_of(item_seq, item_seq_len)
        return self.verbalizer.scores(self.questions(histories, candidates)).log_softmax(-1)

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        scores = self._retrieve(interaction)
        top = scores.topk(self.num_candidates + 1)  # the last one is no candidate
        best, falling = top.indices[:, :-1], strictly_falling(top.values)[:, :-1]
        histories, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        candidates = best.gather(1, shuffled(best, histories, self.seed).argsort(1))  # [B, C]
        values = scores.gather(1, candidates)
        retriever = values.log_softmax(-1)
        target = torch.full_like(lengths, -1)
        asked = torch.ones_like(lengths, dtype=torch.bool)
        if self.ITEM_ID in interaction.interaction:
            target = column_of(candidates, interaction[self.ITEM_ID])
            if self.rerank == "retrieved":
                # Where the target is no candidate, their order cannot change its rank.
                asked = target >= 0
        language = torch.full_like(retriever, torch.nan)
        if asked.any():
            language[asked] = self._answers(histories[asked], lengths[asked], candidates[asked]).to(language.dtype)
        if self.records is not None:
            self.records.append(Reranked(target.cpu(), language.cpu(), retriever.cpu()))
        order = fuse(language, retriever, float(self.fusion)).argsort(dim=1, descending=True, stable=True)
        order[~asked] = retriever[~asked].argsort(dim=1, descending=True, stable=True)
        return scores.scatter(1, candidates.gather(1, order), falling)

    def _answers(self, item_seq: Tensor, item_seq_len: Tensor, candidates: Tensor) -> Tensor:
        """As :meth:`forward`, which runs only for what tuning did not find."""

        def fresh(missing: list[int]) -> Tensor:
            self.asked += len(missing)
            return self.forward(item_seq[missing], item_seq_len[missing], candidates[missing])

        # A retriever that reads users or times gives one history several lists of candidates.
        questions = list(zip(map(tuple, histories_of(item_seq, item_seq_len)), map(tuple, candidates.tolist())))
        return torch.stack([answer.to(candidates.device) for answer in self.remembered(questions, fresh)])

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID][:, None]).squeeze(1)

    # --- candidates ---

    def _retrieve(self, interaction: Any) -> Tensor:
        """The retriever's scores ``[B, V]``, minus infinity for the padding."""
        with torch.no_grad():
            scores = self.retriever.full_sort_predict(interaction)
        scores = scores.view(len(interaction[self.ITEM_SEQ_LEN]), -1)[:, : self.n_items].float().clone()
        scores[:, 0] = -torch.inf
        return scores

    def candidates_to_learn_from(self, interaction: Any) -> tuple[list[list[int]], Tensor, Tensor]:
        """Histories, candidates ``[B, C]`` in random order, the column of what came ``[B]``;
        skipped rows left out.
        """
        came = interaction[self.ITEM_ID]
        if self.train_candidates == "random":
            noise = torch.rand(len(came), self.n_items, device=came.device)
            # Items of the history are taken only where the catalogue holds no others, and
            # padding never is.
            noise.scatter_(1, interaction[self.ITEM_SEQ], -1.0)
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
        # A target that is not among the candidates is -1; under ``train_candidates: skip`` such
        # rows are left out.
        kept = target >= 0
        histories = histories_of(interaction[self.ITEM_SEQ][kept], interaction[self.ITEM_SEQ_LEN][kept])
        return histories, candidates[kept], target[kept]

    def questions(self, histories: list[list[int]], candidates: Tensor) -> list[Question]:
        """One prompt for each history and its C candidates ``[B, C]``."""
        titles = self.prompts.titles
        return [
            Question(self.prompts.write(history, items), [titles[item] for item in items])
            for history, items in zip(histories, candidates.tolist())
        ]

    def check_validation(self, valid_data: Any) -> None:
        """Refuse to tune without validation rows, before a retriever is trained for it.

        Raises:
            UserError: there are none, and the fusion weight is to be tuned.
        """
        if self.fusion_tuned and not valid_data:
            raise UserError(
                "fusion_weight: there are no validation rows by which it could be tuned; give a number such as 0.5, or "
                "another split in eval_args"
            )

    @torch.no_grad()
    def tune(self, valid_data: Any) -> None:
        """Choose the fusion weight with the highest NDCG on the validation rows, the smallest
        of equal ones.

        Raises:
            UserError: as of :meth:`check_validation`.
        """
        self.check_validation(valid_data)
        if not self.fusion_tuned:
            return
        self.records = []
        scorer = Scorer(self, valid_data._dataset, valid_data.step)
        with self.remembering():
            for batch in valid_data:
                # What counts are the records that are made meanwhile.
                for _ in scorer.all_items(batch.interaction.to(self.fusion.device)):
                    pass
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


def strictly_falling(values: Tensor) -> Tensor:
    """Values ``[B, K]`` that fall from left to right; equal ones are raised by the least steps that part them."""
    columns = list(values.unbind(1))
    for column in reversed(range(len(columns) - 1)):
        above = columns[column + 1].nextafter(torch.tensor(torch.inf, device=values.device))
        columns[column] = torch.maximum(columns[column], above)
    return torch.stack(columns, 1)


def shuffled(items: Tensor, histories: Tensor, seed: int) -> Tensor:
    """Numbers ``[B, C]`` to sort items ``[B, C]`` by: a hash of the seed, the history
    ``[B, L]`` and the item.
    """
    key = torch.full_like(histories[:, 0], seed)
    # Padding leaves the key as it is, so it does not matter how wide it is.
    for column in histories.T:
        key = torch.where(column > 0, _mix(key ^ column), key)
    return _mix(_mix(key)[:, None] ^ items)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), with an added constant, on int64 that
    wraps around.
    """
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
