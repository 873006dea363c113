"""For those at home in TRL: LlamaRec's preferences as its rows, and its ORPOTrainer on them.

TRL's convention differs from ours: the likelihood is that of prompt and answer, and the odds are from the mean over the
letter and the end of the text. Its trainer is experimental there, and has no checkpoints to go on from of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from recbole_ssm.errors import UserError
from recbole_ssm.files import whole
from recbole_ssm.llm import preference
from recbole_ssm.llm.base import require
from recbole_ssm.model.llamarec import LlamaRec


def preference_rows(model: LlamaRec, loader: Any, epoch: int = 0) -> Iterator[dict[str, str]]:
    """The rows of one epoch: ``prompt``, the ``chosen`` letter, and a ``rejected`` one as ``orpo_rejected`` says.

    Args:
        model: its candidates, prompts and, for ``hardest``, its present opinion are used; ``verbalizer: letters``.
        loader: the training loader of its run.
        epoch: which epoch's order.

    Raises:
        UserError: the model answers by something else than letters.
    """
    if model.verbalizer.kind != "letters":
        raise UserError(f"verbalizer: TRL's rows are answered by letters, got {model.verbalizer.kind}")
    prompts = model.prompts

    def text(tokens: list[int]) -> str:
        return model.tokenizer.decode(tokens)

    loader.steps.begin(epoch)
    for step in loader:
        for part in step.parts:
            batch = part.batch.to(model.fusion.device)
            histories, candidates, target = model.candidates_to_learn_from(batch)
            questions = model.questions(histories, candidates)
            scores = torch.zeros_like(candidates, dtype=torch.float32)
            if model.orpo_rejected == "hardest":
                scores = model.verbalizer.scores(questions)
            rejected = preference.choose_rejected(scores, target, model.orpo_rejected)
            for question, right, wrong in zip(questions, target.tolist(), rejected.tolist()):
                prompt = text([*prompts.prefix, *question.prompt])
                for column in wrong:
                    letters = text([prompts.letters[right]]), text([prompts.letters[column]])
                    yield {"prompt": prompt, "chosen": letters[0], "rejected": letters[1]}


def write_rows(model: LlamaRec, loader: Any, path: Path) -> int:
    """Write :func:`preference_rows` as JSON lines; how many they are."""
    count = 0
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, row in enumerate(preference_rows(model, loader), 1):  # noqa: B007
            print(json.dumps(row, ensure_ascii=False), file=file)
    return count


def orpo_trainer(model: LlamaRec, path: Path, folder: Path, **settings: Any) -> Any:
    """TRL's ORPOTrainer over the language model and the rows of a file; ``train()`` is the caller's.

    It trains the very weights of ``model``, which can be evaluated and saved by our trainer afterwards.

    Args:
        model: a LlamaRec.
        path: what :func:`write_rows` wrote.
        folder: TRL's output folder.
        settings: of trl's ORPOConfig, such as ``beta``, ``learning_rate`` or ``max_steps``.

    Raises:
        UserError: trl is not installed.
    """
    require("trl")
    orpo, datasets = require("trl.experimental.orpo"), require("datasets")
    with open(path, encoding="utf-8") as file:
        rows = datasets.Dataset.from_list([json.loads(line) for line in file])
    own = {
        "beta": model.orpo_lambda,
        "max_length": model.prompts.max_tokens + 2,  # a longer row would lose its answer, and its loss be NaN
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": model.fusion.device.type == "cpu",
    }
    arguments = orpo.ORPOConfig(str(folder), **{**own, **settings})
    return orpo.ORPOTrainer(
        model=model.language_model, args=arguments, train_dataset=rows, processing_class=model.tokenizer
    )
