"""From a language model to scores of candidates, in one forward pass.

``letters``
    The logits of the candidates' letters at the prompt's last position (LlamaRec, arXiv
    2311.02089, section 3.3). Of the vocabulary only those rows are computed.
``title_likelihood``
    The mean log-likelihood of each candidate's title as the answer. All titles follow their
    prompt in one row; each sees the prompt and itself, so the prompt's keys and values are
    computed once.
``embedding``
    The dot product of the last hidden state with a title's embedding, the mean of its tokens'
    rows of the output head: their mean logit.

Rows are padded on the right, where a causal model does not look, so padding cannot change an
answer. In evaluation the keys and values of the beginning that all prompts share are computed
once, and rows of similar length are batched. The last two verbalizers and the way in which
titles share a row are our own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from logging import getLogger
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.llm.prompt import Prompts, Question

VERBALIZERS = ("letters", "title_likelihood", "embedding")
CLOSE = 1e-2
"""How far scores may be from those of plain forward passes, where weights are held in float32."""
CLOSE_IN_16_BITS = 0.25
"""The same where weights are held in 16 bits."""
LARGEST_LOGITS = 2**26
"""How many entries of ``[positions, vocabulary]`` are held at once where no gradient is wanted."""
Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of the prefix, layer by layer ``[1, heads, tokens, head_dim]``."""


class Verbalizer:
    """Scores candidates by a causal language model.

    Args:
        language_model: transformers' causal model, or peft's around it.
        prompts: what writes the prompts; its prefix comes before each of them.
        kind: one of :data:`VERBALIZERS`.
        batch_tokens: tokens of one forward pass, padding included; a longer row has a pass of
            its own.
        share_prefix: compute the prefix once where no gradient is wanted.

    Before it is used, its scores are compared with those of plain forward passes, also on a
    question as long as they can become, because a model's attention may have a window. Scores
    that are wrong only because the prefix is shared, as in layers without keys and values, are
    computed without sharing it.

    Raises:
        UserError: the tokenizer splits letters that are to be read; the scores are not those of
            plain forward passes.
    """

    def __init__(
        self,
        language_model: Any,
        prompts: Prompts,
        kind: str,
        batch_tokens: int = 16384,
        share_prefix: bool = True,
    ) -> None:
        causal = language_model.get_base_model() if hasattr(language_model, "get_base_model") else language_model
        self.decoder: nn.Module = causal.base_model
        self.head: Any = causal.get_output_embeddings()
        names = inspect.signature(self.decoder.forward).parameters
        # Older releases of transformers call it past_key_values.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self.kind, self.batch_tokens, self.share_prefix = kind, batch_tokens, share_prefix
        self.prefix, self.letters = prompts.prefix, prompts.letters if kind == "letters" else []
        if kind == "embedding" and self.head.bias is not None:
            raise UserError("verbalizer: embedding needs an output head without a bias; take another one")
        self._check(causal, prompts)

    def scores(self, questions: Sequence[Question]) -> Tensor:
        """Scores ``[B, C]`` without a gradient, float32 and higher for the better; the answers
        number C in each row.
        """
        found = torch.empty(len(questions), len(questions[0].answers), device=self._device)
        with torch.no_grad():
            cache = self._prefix_cache() if self.share_prefix else None
            for rows in buckets([self._length(question) for question in questions], self.batch_tokens):
                found[rows] = self._forward([questions[row] for row in rows], cache, probabilities=False)
        return found

    def log_probabilities(self, questions: Sequence[Question]) -> Tensor:
        """Mean log-probabilities ``[B, C]`` over the whole vocabulary, with a gradient.

        Those of ``embedding`` are over the candidates; there is no other.
        """
        found = self._forward(questions, None, probabilities=True)
        return found.log_softmax(-1) if self.kind == "embedding" else found

    # --- one forward pass ---

    def _forward(self, questions: Sequence[Question], cache: Cache | None, probabilities: bool) -> Tensor:
        prompts = [question.prompt if cache else [*self.prefix, *question.prompt] for question in questions]
        if self.kind == "title_likelihood":
            return self._title_likelihood(prompts, [question.answers for question in questions], cache)
        last = self._last_states(prompts, cache)
        if self.kind == "embedding":
            return self._pooled_logits(last, [question.answers for question in questions])
        if not probabilities:
            # In float32, because in bfloat16 scores that are close would become equal.
            bias = None if self.head.bias is None else self.head.bias[self.letters].float()
            return F.linear(last.float(), self.head.weight[self.letters].float(), bias)
        logits = self.head(last).float()
        return logits[:, self.letters] - logits.logsumexp(-1, keepdim=True)

    def _last_states(self, prompts: list[list[int]], cache: Cache | None) -> Tensor:
        """The hidden state at the last token of each prompt ``[B, hidden]``."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        states = self._decode(_padded(prompts, self._device), cache)
        return states[torch.arange(len(prompts), device=self._device), lengths - 1]

    def _title_likelihood(
        self,
        prompts: list[list[int]],
        answers: list[list[list[int]]],
        cache: Cache | None,
    ) -> Tensor:
        """Mean log-likelihoods ``[B, C]``; a row is a prompt and, side by side behind it, the titles.

        The first token of a title is predicted at the end of the prompt, each later one at the
        token before it. So the last token of a title predicts nothing, and is left out of the
        row.
        """
        rows, branches, positions = [], [], []
        # Of each token that is predicted: the row and column of the state that predicts it, the
        # token, and its title, counted through the batch.
        where: list[tuple[int, int]] = []
        what: list[int] = []
        whose: list[int] = []
        for row, (prompt, titles) in enumerate(zip(prompts, answers)):
            tokens, branch, position = list(prompt), [0] * len(prompt), list(range(len(prompt)))
            for number, title in enumerate(titles):
                steps = [len(prompt) - 1, *range(len(tokens), len(tokens) + len(title) - 1)]
                where += [(row, step) for step in steps]
                what += title
                whose += [row * len(titles) + number] * len(title)
                tokens += title[:-1]
                branch += [number + 1] * (len(title) - 1)
                position += range(len(prompt), len(prompt) + len(title) - 1)
            rows.append(tokens)
            branches.append(branch)
            positions.append(position)
        branch_BS = _padded(branches, self._device, fill=-1)
        states = self._decode(_padded(rows, self._device), cache, branch_BS, _padded(positions, self._device))
        at = torch.tensor(where, device=self._device)
        found = self._token_log_likelihood(states[at[:, 0], at[:, 1]], torch.tensor(what, device=self._device))
        title_of = torch.tensor(whose, device=self._device)
        count = len(prompts) * len(answers[0])
        sums = found.new_zeros(count).index_add(0, title_of, found)
        return (sums / title_of.bincount(minlength=count)).view(len(prompts), -1)

    def _token_log_likelihood(self, states: Tensor, token: Tensor) -> Tensor:
        """Log-likelihoods ``[n]`` of tokens ``[n]`` from the states ``[n, hidden]`` that
        predict them.
        """
        if torch.is_grad_enabled():
            return -F.cross_entropy(self.head(states).float(), token, reduction="none")
        chunk = max(1, LARGEST_LOGITS // len(self.head.weight))
        parts = zip(states.split(chunk), token.split(chunk))
        return torch.cat([-F.cross_entropy(self.head(s).float(), t, reduction="none") for s, t in parts])

    def _pooled_logits(self, last: Tensor, answers: list[list[list[int]]]) -> Tensor:
        flat = [token for titles in answers for title in titles for token in title]
        sizes = torch.tensor([len(title) for titles in answers for title in titles], device=self._device)
        title = torch.arange(len(sizes), device=self._device).repeat_interleave(sizes)
        rows = self.head.weight[flat].float()
        pooled = rows.new_zeros(len(sizes), rows.shape[1]).index_add(0, title, rows) / sizes[:, None]
        return torch.einsum("bch,bh->bc", pooled.view(len(answers), -1, rows.shape[1]), last.float())

    def _decode(
        self,
        tokens_BS: Tensor,
        cache: Cache | None,
        branch_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, S, hidden]`` of right-padded tokens, after the cached prefix if there is one.

        ``branch_BS`` is 0 for the tokens of the prompt, and the number of the title, from 1,
        for those of a title: they see the prompt and their own title only.
        """
        known = len(self.prefix) if cache else 0
        options: dict[str, Any] = {"use_cache": False}
        if cache:
            options[self._cache_name] = _cache_of(cache, len(tokens_BS))
        if branch_BS is not None and position_BS is not None:
            length = tokens_BS.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
            seen = (branch_BS[:, None, :] == 0) | (branch_BS[:, None, :] == branch_BS[:, :, None])
            seen = F.pad(seen & causal, (known, 0), value=True)[:, None]
            dtype = self.head.weight.dtype
            mask = torch.zeros(seen.shape, dtype=dtype, device=self._device)
            options["attention_mask"] = mask.masked_fill(~seen, torch.finfo(dtype).min)
            options["position_ids"] = position_BS + known
        return self.decoder(input_ids=tokens_BS, **options)[0]

    def _prefix_cache(self) -> Cache:
        tokens = torch.tensor([self.prefix], device=self._device)
        found = getattr(self.decoder(input_ids=tokens, use_cache=True), self._cache_name)
        return [(layer.keys, layer.values) for layer in found.layers]

    # --- small things ---

    @property
    def _device(self) -> torch.device:
        return self.head.weight.device

    def _length(self, question: Question) -> int:
        if self.kind != "title_likelihood":
            return len(question.prompt)
        return len(question.prompt) + sum(map(len, question.answers)) - len(question.answers)

    # --- the comparison with plain forward passes ---

    @torch.no_grad()
    def _check(self, causal: Any, prompts: Prompts) -> None:
        name = type(causal).__name__
        tokens = torch.tensor([self.prefix[:2]], device=self._device)
        whole, own = causal(input_ids=tokens).logits, self.head(self.decoder(input_ids=tokens)[0])
        if not torch.allclose(whole, own, CLOSE, CLOSE):
            raise UserError(
                f"base_model: {name} changes its logits after its output head (as by a soft cap or a scale), which is "
                "not supported; take a model such as Llama, Qwen, SmolLM, Mistral or GPT-2"
            )
        questions = prompts.examples()
        expected = torch.stack([self._plainly(causal, question) for question in questions])
        allowed = CLOSE_IN_16_BITS if self.head.weight.dtype in (torch.bfloat16, torch.float16) else CLOSE
        for cached in (False, True) if self.share_prefix else (False,):
            try:
                found = self._forward(questions, self._prefix_cache() if cached else None, probabilities=False)
                apart = float((found - expected).abs().max())
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                apart, reason = torch.inf, str(error).splitlines()[0] if str(error) else type(error).__name__
            else:
                reason = f"scores are {apart:.2g} off"
            if apart <= allowed:
                continue
            if not cached:
                raise UserError(
                    f"verbalizer: {self.kind} does not give the scores of plain forward passes of {name} ({reason}), "
                    "as where attention has a window or there is none; take another verbalizer or base_model"
                )
            getLogger().info(f"base model {name}: the beginning of the prompts is computed for each of them ({reason})")
            self.share_prefix = False

    def _plainly(self, causal: Any, question: Question) -> Tensor:
        """The scores ``[C]`` by a forward pass of the whole model for each prompt or title."""

        def logits(tokens: list[int]) -> Tensor:
            return causal(input_ids=torch.tensor([tokens], device=self._device)).logits[0].float()

        prompt = [*self.prefix, *question.prompt]
        if self.kind == "letters":
            return logits(prompt)[-1, self.letters]
        if self.kind == "embedding":
            last = logits(prompt)[-1]
            return torch.stack([last[title].mean() for title in question.answers])
        found = []
        for title in question.answers:
            log_p = logits([*prompt, *title[:-1]])[len(prompt) - 1 :].log_softmax(-1)
            found.append(log_p[torch.arange(len(title)), title].mean())
        return torch.stack(found)


def buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers in groups of similar length, shortest first; rows times longest is at most ``batch_tokens`` in each.

    A row that is longer than that is a group of its own.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[row] > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _padded(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def _cache_of(layers: Cache, rows: int) -> Any:
    """A cache of transformers' that holds the same keys and values for each of so many rows."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return cache
