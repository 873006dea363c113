"""Candidates a second of LlamaRec's verbalizers, beside a plain implementation of each.

Plain is: prompts padded to the longest, one batch after the other, the logits of the whole vocabulary at all positions;
for titles, a row for every candidate. Ours computes letters at the last position, rows of like length together, the
instruction once, and all titles of a user behind one prompt; `without` takes one of these away. Users and titles are
made up; their histories have 1 to 20 titles. speedup_over_plain is the plain one's median over the row's own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.arguments import add_counts, some_of
from recbole_ssm.bench import Row
from recbole_ssm.bench.measure import add_device, medians
from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import load_base_model
from recbole_ssm.llm.prompt import Prompts, Question, prompt_words
from recbole_ssm.llm.verbalizer import VERBALIZERS, Verbalizer

WORDS = ("the", "of", "red", "silent", "river", "night", "last", "city", "winter", "garden", "king", "stone", "letter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    kinds = some_of(VERBALIZERS)
    parser.add_argument("--base_model", default="random", help="a folder, a .gguf file, a name, or random")
    parser.add_argument("--verbalizers", type=kinds, default=",".join(VERBALIZERS), help="separated by commas")
    add_counts(
        parser,
        vocabulary=(32000, "of a random base model; Llama-2 has as much"),
        width=(128, "of a random base model"),
        layers=(4, "of a random base model"),
        users=(8, "whose candidates are scored"),
        batch_size=(4, "rows in a batch of the plain implementation"),
        candidates=(20, "of each user"),
        rounds=(3, "measurements, of which the median counts"),
    )
    add_device(parser)


def run(options: argparse.Namespace) -> Iterator[Row]:
    """Measure; one row a verbalizer and implementation.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's.
        AssertionError: an implementation gives other scores than the plain one.
    """
    rng = random.Random(0)
    titles = ["", *(" ".join(rng.choices(WORDS, k=rng.randint(2, 8))).title() for _ in range(1000))]
    base = load_base_model(_keys(options), [*titles[1:], *(f" {title}" for title in titles), *prompt_words()])
    if options.base_model == "random":
        if options.vocabulary < len(base.tokenizer):
            raise UserError(
                f"--vocabulary: must be at least {len(base.tokenizer)}, as many tokens as the titles need, got "
                f"{options.vocabulary}"
            )
        # From so few titles the tokenizer has learned fewer tokens.
        base.model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
    for kind in options.verbalizers:
        prompts = Prompts(
            base.tokenizer,
            titles,
            history=20,
            candidates=options.candidates,
            title_tokens=32,
            max_tokens=min(1536, base.context),
            answer="title" if kind == "title_likelihood" else "letter",
        )
        questions = []
        for _ in range(options.users):
            items = rng.sample(range(1, len(titles)), options.candidates)
            history = rng.choices(range(1, len(titles)), k=rng.randint(1, 20))
            questions.append(Question(prompts.write(history, items), [prompts.titles[item] for item in items]))
        yield from _rows(kind, base.model, prompts, questions, options)


def _rows(kind: str, model: Any, prompts: Prompts, questions: list[Question], options: argparse.Namespace) -> list[Row]:
    tokens = options.batch_size * 512
    in_turn = Verbalizer(model, prompts, kind, 10**9)
    ways: dict[str, Any] = {
        "plain": partial(plain, model, prompts, kind, questions, options.batch_size),
        "ours": partial(Verbalizer(model, prompts, kind, tokens).scores, questions),
        "without prefix": partial(Verbalizer(model, prompts, kind, tokens, False).scores, questions),
        "without buckets": partial(_in_turn, in_turn, questions, options.batch_size),
    }
    expected = ways["plain"]()
    for name, way in ways.items():
        if not torch.allclose(way(), expected, rtol=1e-2, atol=1e-2):
            raise AssertionError(f"{kind}, {name}: other scores than the plain ones")
    seconds = medians(ways, options.rounds, options.device)
    return [
        {
            "verbalizer": kind,
            "implementation": name,
            "candidates_per_second": options.users * options.candidates / value,
            "s_a_user": value / options.users,
            "speedup_over_plain": seconds["plain"] / value,
        }
        for name, value in seconds.items()
    ]


@torch.no_grad()
def plain(model: Any, prompts: Prompts, kind: str, questions: list[Question], batch: int) -> Tensor:
    """Scores ``[users, candidates]``, computed without any of our savings."""
    found = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        whole = [[*prompts.prefix, *question.prompt] for question in part]
        if kind != "title_likelihood":
            logits = _logits(model, whole)
            last = logits[torch.arange(len(part)), torch.tensor([len(tokens) - 1 for tokens in whole])]
            if kind == "letters":
                found += list(last[:, prompts.letters])
            else:
                found += [torch.stack([row[title].mean() for title in q.answers]) for row, q in zip(last, part)]
            continue
        for question, prompt in zip(part, whole):
            row = []
            for first in range(0, len(question.answers), batch):
                titles = question.answers[first : first + batch]
                log_p = _logits(model, [[*prompt, *title] for title in titles]).log_softmax(-1)
                for one, title in zip(log_p, titles):
                    row.append(one[torch.arange(len(title)) + len(prompt) - 1, title].mean())
            found.append(torch.stack(row))
    return torch.stack(found).float()


def _logits(model: Any, rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=tokens, attention_mask=mask).logits


def _in_turn(verbalizer: Verbalizer, questions: list[Question], batch: int) -> Tensor:
    parts = range(0, len(questions), batch)
    return torch.cat([verbalizer.scores(questions[start : start + batch]) for start in parts])


def _keys(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": 3 * options.width,
        "num_hidden_layers": options.layers,
        "max_position_embeddings": 4096,
    }
    return {
        "base_model": options.base_model,
        "base_model_dtype": "bfloat16" if options.device.type == "cuda" else "float32",
        "base_model_download": False,
        "quantize_4bit": False,
        "random_base_args": sizes if options.base_model == "random" else None,
        "lora_r": 0,
        "gradient_checkpointing": False,
        "device": options.device,
        "seed": 0,
        "show_progress": False,
    }
