"""LlamaRec's training rows as preference pairs, for tools that train on such: prompt, chosen and rejected answer.

:func:`export` writes them as JSON lines, and :func:`train_with_trl` trains a base model on them
by TRL's ORPOTrainer. That is not quite LlamaRec's own ``train_objective: orpo``. TRL averages
the likelihood over prompt and answer, LlamaRec over the answer only; TRL's odds include the end
of the text behind the answer; and TRL reads each prompt twice, once with each answer, where
LlamaRec reads all letters in one pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from recbole_ssm.console import progress_bar, shows_progress
from recbole_ssm.errors import UserError, require
from recbole_ssm.files import whole
from recbole_ssm.llm.base import load_base_model
from recbole_ssm.llm.preference import choose_rejected
from recbole_ssm.llm.prompt import LETTERS, tell_of_shortened

FIELDS = ("prompt", "chosen", "rejected")


@torch.no_grad()
def preference_pairs(model: Any, loader: Iterable[Any]) -> Iterator[dict[str, str]]:
    """The pairs of one epoch, in the order in which the loader gives its rows.

    Candidates and rejected answers are drawn as in training, by the global random state;
    ``orpo_rejected: all`` gives a pair for each wrong candidate.

    Args:
        model: a :class:`~recbole_ssm.model.LlamaRec`, its retriever trained.
        loader: its :class:`~recbole_ssm.data.loader.TrainLoader`.

    Yields:
        ``prompt``, ``chosen`` and ``rejected``, as text without special tokens.
    """
    model.eval()
    for step in loader:
        for part in step.parts:
            yield from _pairs_of(model, part.batch.to(model.device))
    tell_of_shortened(model.prompts)


def _pairs_of(model: Any, batch: Any) -> Iterator[dict[str, str]]:
    histories, candidates, target = model.candidates_to_learn_from(batch)
    if not histories:
        return
    questions = model.questions(histories, candidates)
    scores = torch.zeros(candidates.shape, device=candidates.device)
    if model.orpo_rejected == "hardest":
        scores = model.verbalizer.scores(questions)
    rejected = choose_rejected(scores, target, model.orpo_rejected)
    letters = model.prompts.answer == "letter"
    for question, right, wrong, items in zip(questions, target.tolist(), rejected.tolist(), candidates.tolist()):
        prompt = model.tokenizer.decode([*model.prompts.prefix, *question.prompt], skip_special_tokens=True)
        answers = [LETTERS[number] if letters else model.titles[item] for number, item in enumerate(items)]
        for column in wrong:
            yield {"prompt": prompt, "chosen": answers[right], "rejected": answers[column]}


def export(path: Path, model: Any, loader: Any, show_progress: bool) -> int:
    """Write the pairs of one epoch as JSON lines; returns how many.

    Args:
        path: the file to write.
        model: as of :func:`preference_pairs`.
        loader: its :class:`~recbole_ssm.data.loader.TrainLoader`.
        show_progress: show a bar of the steps.
    """
    bar = progress_bar(loader, show_progress, desc="Pairs", unit="step")
    count = write_pairs(path, preference_pairs(model, bar))
    getLogger().info(f"{path}: {count:,} preference pairs of {loader.plan.total:,} training rows")
    return count


def write_pairs(path: Path, pairs: Iterable[dict[str, str]]) -> int:
    """Write pairs as JSON lines, whole or not at all; returns how many.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Read what :func:`write_pairs` wrote, or any JSON lines with these three texts.

    Raises:
        UserError: the file is missing or empty, or a line of it holds something else.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
                    raise UserError(f"{path}, line {number}: must hold the texts {', '.join(FIELDS)}")
                pairs.append({field: row[field] for field in FIELDS})
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write it by recbole-ssm pairs") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}, line {len(pairs) + 1}: not JSON ({error})") from error
    if not pairs:
        raise UserError(f"{path}: there is no pair in it")
    return pairs


def train_with_trl(pairs: Path, output: Path, config: Any, **arguments: Any) -> Path:
    """Train a base model on preference pairs by TRL's ORPOTrainer.

    Args:
        pairs: a file of :func:`write_pairs`.
        output: a folder for the result, which must not exist: weights with LoRA merged into
            them, and the tokenizer, as ``base_model`` takes them.
        config: ``base_model`` and its other keys, as
            :func:`~recbole_ssm.llm.base.load_base_model` reads them.
        **arguments: of TRL's ORPOConfig, such as ``beta`` (ORPO's lambda), ``learning_rate``,
            ``num_train_epochs`` and ``per_device_train_batch_size``. ``max_length`` is that of
            the longest pair: TRL would cut a longer one's answer off silently. 16-bit training
            and gradient checkpointing, TRL's defaults, are off unless asked for; nothing is
            reported anywhere.

    Returns:
        The folder.

    Raises:
        UserError: TRL is missing, a pair is longer than the base model's context, or TRL
            refuses an argument.
    """
    orpo, datasets = require("trl.experimental.orpo"), require("datasets")
    output = Path(output)
    if output.exists():
        raise UserError(f"{output}: exists; name a folder that does not")
    rows = read_pairs(Path(pairs))
    if config["quantize_4bit"]:
        raise UserError("quantize_4bit: LoRA is merged into the weights afterwards, which 4 bits cannot hold")
    base = load_base_model(config, [text for row in rows for text in row.values()])
    lengths = _lengths(rows, base.tokenizer)
    longest = max(lengths)
    if longest > base.context:
        raise UserError(
            f"{pairs}, line {lengths.index(longest) + 1}: {longest} tokens, and {base.name} reads {base.context}; "
            "write the pairs with a smaller prompt_history"
        )
    if arguments.setdefault("max_length", longest) < longest:
        raise UserError(
            f"max_length: {arguments['max_length']} would cut off the answer of a pair of {longest} tokens; leave it "
            "out"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".trl-") as scratch:
        settings = _orpo_config(orpo, scratch, config, arguments)
        data = datasets.Dataset.from_list(rows)
        orpo.ORPOTrainer(base.model, settings, train_dataset=data, processing_class=base.tokenizer).train()
        model = base.model.merge_and_unload() if hasattr(base.model, "merge_and_unload") else base.model
        model.save_pretrained(Path(scratch) / "model")
        base.tokenizer.save_pretrained(Path(scratch) / "model")
        os.replace(Path(scratch) / "model", output)
    getLogger().info(f"{output}: {base.name}, trained on {len(rows)} pairs; use it as base_model")
    return output


def _orpo_config(orpo: Any, folder: str, config: Any, arguments: dict[str, Any]) -> Any:
    defaults = {
        "output_dir": folder,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": torch.device(config["device"]).type != "cuda",
        "seed": config["seed"],
        "disable_tqdm": not shows_progress(config["show_progress"]),
    }
    try:
        return orpo.ORPOConfig(**{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise UserError(f"TRL's ORPOConfig does not take {arguments} ({error})") from error


def _lengths(rows: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Tokens of each pair's longer half, with the beginning and the end that TRL adds."""
    found = []
    for row in rows:
        halves = tokenizer([row["prompt"] + row[answer] for answer in ("chosen", "rejected")]).input_ids
        found.append(max(map(len, halves)) + 2)
    return found
