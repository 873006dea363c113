"""
GPT4Rec
################################################
Reference:
    Jinming Li et al. "GPT4Rec: A Generative Framework for Personalized Recommendation and User
    Interests Interpretation." arXiv 2304.03879, 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_ssm import distributed
from recbole_ssm.console import progress_bar
from recbole_ssm.errors import UserError, require
from recbole_ssm.llm.bm25 import TitleSearch, found, full_order, merge
from recbole_ssm.llm.model import LanguageModelRecommender
from recbole_ssm.llm.prompt import Counts, piece_encoder, start_of_text

BOUGHT = "Previously, the customer has bought:"
WANTS = " In the future, the customer wants to buy"


class GPT4Rec(LanguageModelRecommender):
    """A language model writes search queries from the titles of a history; BM25 over all titles answers them.

    The prompt, the beam search, BM25 and the merge are the paper's, whose code is not public.
    Where it does not say, the choice is ours: the loss is that of the target's title and of the
    end behind it, and not of the prompt; titles are cut to ``title_tokens``; training rows are
    RecBole's, the newest ``train_last`` of each user.

    The score of an item is minus its place in the order of
    :func:`recbole_ssm.llm.bm25.full_order`, so that no two scores are equal.
    """

    bm25: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)

        # load parameters info
        self.num_queries = config["num_queries"]
        self.num_beams = config["num_beams"] or self.num_queries
        self.title_tokens = config["title_tokens"]
        self.length_penalty = config["length_penalty"]
        self.cutoffs = config["topk"]
        k1, b = (np.atleast_1d(config[key]).tolist() for key in ("bm25_k1", "bm25_b"))
        self.grid = list(product(k1, b))
        self.valid_cutoff = int(str(config["valid_metric"]).partition("@")[2] or max(self.cutoffs))
        self.show_progress = config["show_progress"]
        if self.num_beams < self.num_queries:
            raise UserError(f"num_beams: {self.num_beams} beams end in no {self.num_queries} queries; give more beams")

        # define layers and loss
        self.load_language_model(config, [BOUGHT, WANTS])
        # BM25's k1 and b.
        self.register_buffer("bm25", torch.tensor(self.grid[0], dtype=torch.float64))
        self.search = TitleSearch(self.titles)
        encode = piece_encoder(self.tokenizer)
        self._begin, self._end, self._dot = start_of_text(self.tokenizer, BOUGHT), encode(WANTS), encode(".")
        self._title = [encode(f" {title}")[: self.title_tokens] for title in self.titles]
        # How many tokens are left for the history, beside the fixed words and the query with
        # its end.
        self._room = self.context - len(self._begin) - len(self._end) - self.title_tokens - 1
        if self._room < self.title_tokens + len(self._dot):
            raise UserError(
                f"title_tokens: {self.title_tokens} leave no room for a history in the {self.context} tokens that "
                f"{self.base_name} reads; try title_tokens: {max(1, self.context // 8)}"
            )
        self.prompts = Counts()

    def prompt(self, history: Sequence[int]) -> list[int]:
        """The tokens of a prompt; the oldest items are left out where the base model cannot
        read them all.
        """
        room = self._room
        kept: list[list[int]] = []
        self.prompts.written += 1
        for item in reversed(list(history)):
            tokens = [*self._title[item], *self._dot]
            room -= len(tokens)
            if room < 0:
                self.prompts.shortened += 1
                break
            kept.append(tokens)
        return [*self._begin, *(token for tokens in reversed(kept) for token in tokens), *self._end]

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean over the rows of -ln P(title of the target and its end | prompt)."""
        prompts = [self.prompt(history) for history in self.histories(interaction)]
        answers = [[*self._title[item], self.tokenizer.eos_token_id] for item in interaction[self.POS_ITEM_ID].tolist()]
        length = max(map(len, answers))
        # They are padded on the left, so that the tokens of the answers are the last ones.
        tokens, mask = self._pad(prompt + answer for prompt, answer in zip(prompts, answers))
        options = {"logits_to_keep": length + 1, "attention_mask": mask}
        if self._takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.language_model(tokens, **options).logits[:, -length - 1 : -1]
        asked = torch.arange(length, 0, -1, device=self.device) <= torch.tensor(
            [[len(answer)] for answer in answers], device=self.device
        )
        target = tokens[:, -length:].masked_fill(~asked, -100)
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")
        return nll / len(prompts)

    @torch.no_grad()
    def queries(self, interaction: Any) -> list[list[str]]:
        """The queries for each row of a batch: ``num_queries`` texts, best beam first."""
        histories = [tuple(history) for history in self.histories(interaction)]
        return self.remembered(
            histories, lambda missing: self._generate([self.prompt(histories[number]) for number in missing])
        )

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        self.search.build(*self.bm25.tolist())
        scores = np.zeros((len(interaction), self.n_items), dtype=np.float32)
        for row, queries in enumerate(self.queries(interaction)):
            scores[row, self._order(queries)] = -np.arange(1, self.n_items)
        scores[:, 0] = -self.n_items
        return torch.from_numpy(scores).to(self.device)

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        # In a sampled evaluation a history stands beside each of its candidates, and is asked once.
        histories, row = interaction[self.ITEM_SEQ].unique(dim=0, return_inverse=True)
        asked = Interaction({self.ITEM_SEQ: histories, self.ITEM_SEQ_LEN: (histories > 0).sum(1)})
        return self.full_sort_predict(asked)[row, interaction[self.ITEM_ID]]

    @torch.no_grad()
    def tune(self, valid_data: Any) -> None:
        """Choose BM25's k1 and b from the grid by NDCG at the cut-off of ``valid_metric`` on
        the validation rows.
        """
        if len(self.grid) == 1:
            return
        if not valid_data:
            k1, b = self.grid[0]
            self.logger.warning(
                f"BM25: k1 {k1}, b {b}, the first of {len(self.grid)} pairs: there are no validation rows to choose by"
            )
            return
        rows = valid_data._dataset.inter_feat
        queries: list[list[str]] = []
        step = valid_data.step
        with self.remembering():
            for start in progress_bar(range(0, len(rows), step), self.show_progress, desc="Queries", unit="batch"):
                queries += self.queries(rows[start : start + step])
        targets = rows[self.POS_ITEM_ID].tolist()
        gains = []
        for k1, b in progress_bar(self.grid, self.show_progress, desc="BM25", unit="pair"):
            self.search.build(k1, b)
            gains.append(sum(self._gain(*row) for row in zip(queries, targets)) / max(len(targets), 1))
        gains = distributed.mean(gains)
        k1, b = self.grid[int(np.argmax(gains))]
        self.bm25.copy_(torch.tensor([k1, b], dtype=self.bm25.dtype))
        self.logger.info(
            f"BM25: k1 {k1}, b {b} of {len(self.grid)} pairs, on {len(targets)} validation rows: "
            f"NDCG@{self.valid_cutoff} {max(gains):.4f}, the least {min(gains):.4f}"
        )

    def _gain(self, queries: Sequence[str], target: int) -> float:
        """NDCG at the cut-off of ``valid_metric``, where ``target`` is the one right item."""
        order = self._order(queries, self.valid_cutoff)[: self.valid_cutoff]
        place = np.flatnonzero(order == target)
        return 1 / float(np.log2(place[0] + 2)) if len(place) else 0.0

    def _order(self, queries: Sequence[str], enough: int | None = None) -> np.ndarray:
        """Item ids in the order in which they are recommended ``[V - 1]``; or the first of
        them, ``enough`` or more.
        """
        bm25 = np.stack([self.search.scores(query) for query in queries])
        merged = merge([found(scores, max(self.cutoffs)) for scores in bm25], self.cutoffs)
        return np.array(merged) if enough and len(merged) >= enough else full_order(merged, bm25)

    def _generate(self, prompts: list[list[int]]) -> list[list[str]]:
        tokens, mask = self._pad(prompts)
        settings = require("transformers").GenerationConfig(
            num_beams=self.num_beams,
            num_return_sequences=self.num_queries,
            max_new_tokens=self.title_tokens + 1,
            length_penalty=self.length_penalty,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.language_model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
        texts = self.tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
        return [texts[start : start + self.num_queries] for start in range(0, len(texts), self.num_queries)]

    def _pad(self, rows: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, L]``, padded on the left, and the mask of what is real."""
        rows = list(rows)
        longest = max(map(len, rows))
        tokens = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)
