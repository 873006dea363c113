"""The main job: configuration, data, model, training, evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger
from typing import Any

import torch

from recbole_ssm import compat

compat.install()

from recbole.data import data_preparation  # noqa: E402
from recbole.utils import dict2str, init_logger, init_seed  # noqa: E402

from recbole_ssm.config import SSMConfig  # noqa: E402
from recbole_ssm.data import create_dataset  # noqa: E402
from recbole_ssm.errors import UserError  # noqa: E402
from recbole_ssm.model import get_model  # noqa: E402
from recbole_ssm.ops import set_backend  # noqa: E402
from recbole_ssm.serving import load_recommender  # noqa: E402
from recbole_ssm.trainer import get_trainer  # noqa: E402

__all__ = ["load_recommender", "run_recbole_ssm"]


@contextlib.contextmanager
def recbole_refusals(what: str) -> Iterator[None]:
    """Turn the errors by which RecBole, its models and PyTorch's optimisers refuse a setting into one line."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what}: the data has no field {error}; load it by load_col, or ask for another") from error
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"{what}: {error}") from error


def run_recbole_ssm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Iterable[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    command_line: Iterable[str] = (),
) -> dict[str, Any]:
    """Train and test a model on a data set, as recbole.quick_start.run_recbole does.

    Args:
        model: Mamba4Rec, 2Mamba4Rec, Hydra4Rec, or any sequential model of RecBole's. None takes it from the options,
            or Hydra4Rec.
        dataset: name of the data set; its files are ``<data_path>/<dataset>/<dataset>.inter`` and so on. None takes it
            from the options, or ml-100k.
        config_file_list: YAML files; a later one wins.
        config_dict: options; they win over files.
        saved: keep the best checkpoint, and test with it. Otherwise the last weights are tested.
        command_line: options as ``["--key=value", ...]``; they win over all else.

    Returns:
        RecBole's result: ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result``; and
        ``checkpoint``, the path of the best checkpoint (None if not saved).

    Raises:
        UserError: something given is wrong; the message is one line that says what and how to mend it.
    """
    config = SSMConfig(model, dataset, config_file_list, config_dict, command_line)
    set_backend(config["ssm_backend"])
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    logger = getLogger()
    logger.info(config)

    data = create_dataset(config)
    logger.info(data)
    with recbole_refusals(config["dataset"]):
        train_data, valid_data, test_data = data_preparation(config, data)

    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with recbole_refusals(config["model"]):
        recommender = get_model(config["model"])(config, train_data._dataset).to(config["device"])
    logger.info(recommender)
    parameters = sum(p.numel() for p in recommender.parameters() if p.requires_grad)
    logger.info(
        f"{config['model']}: {parameters:,} trainable parameters on {config['device']}, "
        f"{torch.get_num_threads()} CPU threads, seed {config['seed']}"
    )

    with recbole_refusals(config["learner"]):
        trainer = get_trainer(config)(config, recommender)
    with contextlib.closing(trainer.tensorboard):
        best_valid_score, best_valid_result = trainer.fit(
            train_data, valid_data, saved=saved, show_progress=config["show_progress"]
        )
        test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=config["show_progress"])
    logger.info(f"best valid: {dict2str(best_valid_result)}")
    logger.info(f"test result: {dict2str(test_result)}")
    if saved:
        logger.info(f"checkpoint: {trainer.saved_model_file}")
    return {
        "best_valid_score": best_valid_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_valid_result,
        "test_result": test_result,
        "checkpoint": trainer.saved_model_file if saved else None,
    }
