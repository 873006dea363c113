"""The main job: configuration, data, model, training, evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from recbole_ssm import compat, distributed

compat.install()

from recbole.utils import init_seed  # noqa: E402

from recbole_ssm.arguments import parse_options  # noqa: E402
from recbole_ssm.config import Config  # noqa: E402
from recbole_ssm.console import RESULT, begin_log, closing, opening  # noqa: E402
from recbole_ssm.data import create_dataset  # noqa: E402
from recbole_ssm.data.loader import TrainLoader, create_loaders  # noqa: E402
from recbole_ssm.data.outline import item_tokens  # noqa: E402
from recbole_ssm.errors import UserError  # noqa: E402
from recbole_ssm.evaluation import metrics  # noqa: E402
from recbole_ssm.files import check_writable  # noqa: E402
from recbole_ssm.keys import KEYS  # noqa: E402
from recbole_ssm.llm import pairs  # noqa: E402
from recbole_ssm.model.registry import build_model  # noqa: E402
from recbole_ssm.ops import set_backend  # noqa: E402
from recbole_ssm.serving import load_recommender  # noqa: E402
from recbole_ssm.starting import (  # noqa: E402
    Saved,
    configure,
    configure_again,
    configure_from,
    configure_ranker,
    read_resume,
    require_data,
    require_same_items,
    take_weights,
)
from recbole_ssm.trainer import Hook, Trainer, checkpoint, known_items  # noqa: E402
from recbole_ssm.trainer.records import require_wandb  # noqa: E402
from recbole_ssm.trainer.refusals import recbole_refusals, refusals_of_a_run  # noqa: E402
from recbole_ssm.trainer.snapshot import require_same_run  # noqa: E402

__all__ = [
    "configure",
    "export_pairs",
    "load_data_and_model",
    "load_recommender",
    "objective_function",
    "run_recbole_ssm",
]


def run_recbole_ssm(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Iterable[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    command_line: Iterable[str] = (),
    resume: str | Path | None = None,
    allow_pickle: bool = False,
    hooks: Iterable[Hook] = (),
    init: str | Path | None = None,
) -> dict[str, Any]:
    """Train and test a model on a data set, as recbole.quick_start.run_recbole does.

    Args:
        model: Mamba4Rec, 2Mamba4Rec, Hydra4Rec, or any sequential model of RecBole's; or a
            class of your own, or its path as ``package.module:Class``. None takes it from the
            options, or 2Mamba4Rec.
        dataset: name of the data set; its files are ``<data_path>/<dataset>/<dataset>.inter``
            and so on. None takes it from the options, or ml-100k.
        config_file_list: YAML files; a later one wins.
        config_dict: options; they win over files.
        saved: keep the best checkpoint, and test with it. Otherwise what training ended with is
            tested.
        command_line: options as ``["--key=value", ...]``; they win over all else.
        resume: go on from this checkpoint, or from the newest whole one of this folder. Model,
            data set and options are those of its run; only what does not change the result
            (``epochs``, ``stopping_step``, ``show_progress`` ...) may be another. A checkpoint of
            a retriever that was trained for a ranker goes on to the ranker, unless ``model``
            names the retriever.
        allow_pickle: let ``resume`` name one of RecBole's own ``.pth`` checkpoints, whose
            loading runs whatever code the file holds. Take it only from whom you trust. Model,
            data set and options must then be given.
        hooks: called during training and evaluation; see :class:`recbole_ssm.trainer.Hook`.
        init: start from the weights of this checkpoint, or of the best one of this run's folder,
            on a data set that may have new users, events and items. An item keeps its vector by
            its token, a new one starts as configured, and so does the optimiser. Keys that shape
            the model are the checkpoint's.

    Returns:
        RecBole's result: ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``,
        ``test_result``; ``best_valid_result_masked`` and ``test_result_masked``, the same metrics
        in lists without the items of the user's history; ``test_by_group``, both for frequent and
        rare items, for short and long histories, and by the time since the event before
        (:func:`recbole_ssm.evaluation.metrics.by_group`); ``test_result_shuffled_times`` and
        ``test_result_shuffled_times_masked``, the test of a model of ``time: query`` with its query
        times shuffled among the users (None for others); ``protocol``, the split, ties and seed that
        these figures are of; and ``checkpoint``, the path of the best checkpoint (None if not saved),
        and ``model``, its name. For LlamaRec also ``reranking``, the metrics of the test in the
        retriever's, the language model's and the fused order, overall and among the users whose
        target was retrieved. ``ranks``, order -> the rank of each tested row's target, is there for
        LlamaRec and for a model of ``time: query``.

    Raises:
        UserError: something given is wrong; the message is one line that says what and how to
            mend it.
    """
    for name, from_where in (("resume", resume), ("init", init)):
        if from_where == "":
            raise UserError(f"{name}: names no checkpoint; give a file, or the folder of a run")
    if resume is not None and init is not None:
        raise UserError("init: a run that is resumed has its weights; leave out init, or resume")
    start = None if resume is None else read_resume(Path(resume), allow_pickle)
    stage_start = None
    given: dict[str, Any] = {
        "dataset": dataset,
        "config_file_list": config_file_list,
        "config_dict": config_dict,
        "command_line": list(command_line),
    }
    if init is not None:
        first = checkpoint.find_best(Path(init))
        config = configure_from(first, model, **given)
    elif start is not None and (ranker := configure_ranker(start, model, **given)):
        config, stage_start, start = ranker, start, None
    elif start is not None and "config" in start[1].info:
        config = configure_again(start, model, **given)
    else:
        config = configure(model, **given)
    log = begin_log(config) if distributed.rank() == 0 else None
    getLogger().info(opening(config, log))
    with refusals_of_a_run(config["model"]):
        result = _run(config, saved, start, hooks, first if init is not None else None, stage_start)
    distributed.stop()
    getLogger().log(RESULT, closing(config, result))
    return result


def load_data_and_model(
    model_file: str | Path,
    model: str | type | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Iterable[str] = (),
) -> tuple[Config, Any, Any, Any, Any, Any]:
    """A trained model with its data set, as RecBole's function of this name gives them to its case studies.

    Args:
        model_file: a ``.safetensors`` checkpoint, or the folder of a run, for its best one.
        model: the class of the model, or its path, where it is one of your own.
        config_dict: options that are to be others than in the run: another ``data_path`` or
            ``dataset``, another split, other metrics.
        command_line: the same as ``["--key=value", ...]``; they win.

    Returns:
        ``config, model, dataset, train_data, valid_data, test_data``. Events with items that the
        checkpoint does not know are left out, and counted in the log.

    Raises:
        UserError: something given is wrong, or the checkpoint is of another model.
    """
    saved = checkpoint.find_best(Path(model_file))
    command_line = list(command_line)
    given = {**(config_dict or {}), **parse_options(command_line)}
    if "valid_metric" not in given and not given.keys().isdisjoint({"metrics", "topk"}):
        # Nothing is chosen by the run's own here, and it may be none of the metrics that are asked for.
        run = configure_again(saved, model)
        asked = [KEYS[key].take(key, given.get(key, run[key])) for key in ("metrics", "topk")]
        metric, cutoff = (value[0] if isinstance(value, list) else value for value in asked)
        command_line.append(f"--valid_metric={metric}@{cutoff}")
    config = configure_again(saved, model, config_dict=config_dict, command_line=command_line)
    begin_log(config)
    init_seed(config["seed"], config["reproducibility"])
    set_backend(config["ssm_backend"])
    path, found = saved
    items = known_items.items_of(found, path)
    require_data(config)
    with recbole_refusals(config["dataset"]):
        dataset = create_dataset(config, items)
        loaders = create_loaders(config, dataset)
    # LlamaRec's retriever was configured by another run.
    settings = {**config.final_config_dict, "retriever_settings": found.info["config"].get("retriever_settings")}
    with checkpoint.doubted(found, path):
        recommender = build_model(settings, dataset, config["device"], config.model_class)
    if item_tokens(dataset) == items:
        checkpoint.load_weights(recommender, found, path)
    else:
        take_weights(recommender, config, dataset, saved)
    return config, recommender.eval(), dataset, *loaders


def _run(
    config: Config,
    saved: bool,
    start: Saved | None,
    hooks: Iterable[Hook],
    first: Saved | None = None,
    stage_start: Saved | None = None,
) -> dict[str, Any]:
    """One model, from its data to its test; ``stage_start`` is where its first stage goes on."""
    logger = getLogger()
    if start is not None and not hasattr(config.model_class, "first_stage"):
        # Before the data is read. A model of two stages knows all its settings only when it is built.
        path, found = start
        require_same_run(found, path, config, None)
    recommender, train_data, valid_data, test_data = _prepare(config, start, _trains_stage(config, stage_start))
    if start is not None:
        require_same_items(train_data._dataset, start)
    if first is not None:
        take_weights(recommender, config, train_data._dataset, first)
    logger.debug(recommender)
    # Each process draws dropout of its own.
    init_seed(config["seed"] + distributed.rank(), config["reproducibility"])
    parameters = sum(p.numel() for p in recommender.parameters() if p.requires_grad)
    logger.info(
        f"{config['model']}: {parameters:,} trainable parameters on {config['device']}, "
        f"{torch.get_num_threads()} CPU threads, {distributed.world_size()} processes, seed {config['seed']}"
    )
    logger.info(train_data.in_words())

    with recbole_refusals(config["learner"]):
        trainer = Trainer(config, recommender, hooks)
    if start is not None:
        trainer.restore(*start)
        del start
    with contextlib.closing(trainer.tensorboard):
        best_valid_score, best_valid_result = trainer.fit(
            train_data, valid_data, saved=saved, show_progress=config["show_progress"]
        )
        test_result = trainer.test(test_data, load_best_model=saved, show_progress=config["show_progress"])
    result = _result(config, best_valid_score, best_valid_result, test_result)
    if not saved and best_valid_result:
        logger.info("saved=False: the best validation is of its epoch, the test of the last weights")
    result["checkpoint"] = trainer.saved_model_file if saved else None
    for hook in trainer.hooks:
        result |= hook.result()
    shuffled = test_result.shuffled_times if test_result else None
    if shuffled and shuffled.ranking is not None:
        orders = ("shuffled times", "shuffled times masked")
        result["ranks"] = {**result.get("ranks", {}), **dict(zip(orders, shuffled.ranking.ranks.T))}
    return result


def _result(
    config: Config, best_score: float, valid: metrics.Result | None, test: metrics.Result | None
) -> dict[str, Any]:
    """What a run says of its figures, which are logged in full."""
    shuffled = test.shuffled_times if test else None
    protocol = metrics.protocol(config)
    told = {"best valid": valid, "test result": test}
    if shuffled:
        told["test result, query times shuffled among users"] = shuffled
    for name, found in told.items():
        getLogger().debug(f"{name}:\n{found}" if found else f"{name}: there is none")
    getLogger().info(f"protocol: {protocol}")
    return {
        "model": config["model"],
        "best_valid_score": float(best_score),
        "valid_score_bigger": config["valid_metric_bigger"],
        **_both_lists("best_valid_result", valid),
        **_both_lists("test_result", test),
        "test_by_group": test.by_group if test else {},
        **_both_lists("test_result_shuffled_times", shuffled),
        "protocol": protocol,
    }


def _both_lists(name: str, found: metrics.Result | None) -> dict[str, Any]:
    """The metrics of lists with the items of the history, and of those without."""
    return {name: found, f"{name}_masked": found.masked if found else None}


def _prepare(
    config: Config, start: Saved | None, train_stage: Callable[[Config], str]
) -> tuple[Any, TrainLoader, Any, Any]:
    """Model and loaders of a configuration; the first stage of a model of two, such as
    LlamaRec, is trained or read.
    """
    logger = getLogger()
    logger.debug(config.as_yaml())
    require_wandb(config)
    stage = None
    if hasattr(config.model_class, "first_stage"):
        stage = config.model_class.first_stage(config, start[1] if start else None, configure, train_stage)
    set_backend(config["ssm_backend"])
    init_seed(config["seed"], config["reproducibility"])

    if start is not None:
        require_data(config)
    with recbole_refusals(config["dataset"]):
        data = create_dataset(config)
        logger.debug(data)
        logger.info(
            f"{config['dataset']}: {data.user_num - 1:,} users, {data.item_num - 1:,} items, {data.inter_num:,} events"
        )
        loaders = create_loaders(config, data)

    init_seed(config["seed"], config["reproducibility"])
    doubts = checkpoint.doubted(*start[::-1]) if start else contextlib.nullcontext()
    with recbole_refusals(config["model"]), doubts:
        recommender = config.model_class(config, loaders[0]._dataset, *([stage.settings] if stage else ()))
        recommender = recommender.to(config["device"])
    if stage:
        # It comes last, so that whatever is wrong with the model is found before another one is
        # trained for it.
        recommender.check_validation(loaders[1])
        stage.load_into(recommender)
        set_backend(config["ssm_backend"])
    return recommender, *loaders


def _trains_stage(ranker: Config | None, start: Saved | None) -> Callable[[Config], str]:
    """What trains and tests a first stage, from ``start`` on, and gives the path of its best checkpoint.

    Its checkpoints say for which ranker it is trained, but for a class of the user's own, which is never imported
    because a file names it.
    """

    def train(config: Config) -> str:
        config.ranker = None if ranker is None or ranker.class_path else ranker
        path: str = _run(config, True, start, ())["checkpoint"]
        return path

    return train


def objective_function(
    config_dict: Mapping[str, Any] | None = None,
    config_file_list: Iterable[str] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """What HyperTuning calls, RecBole's or :class:`recbole_ssm.study.tune.HyperTuning`: one trial.

    Args:
        config_dict: the values of the trial; they win over files.
        config_file_list: YAML files that name model and data set, and what else is fixed.
        saved: keep the best checkpoint, and test with it.

    Returns:
        As :func:`run_recbole_ssm`.
    """
    return run_recbole_ssm(config_file_list=config_file_list, config_dict=config_dict, saved=saved)


def export_pairs(path: str | Path, *arguments: Any, **options: Any) -> int:
    """Write LlamaRec's training rows as preference pairs, JSON lines of ``prompt``, ``chosen`` and ``rejected``.

    The retriever is trained first, or read from ``retriever_checkpoint``; the base model is not
    trained. See :mod:`recbole_ssm.llm.pairs` for what TRL makes of them.

    Args:
        path: the file to write.
        *arguments: data set, config files, options and command line, as :func:`configure` takes
            them after the model.
        **options: the same by name.

    Returns:
        How many pairs were written: one epoch of the training rows.

    Raises:
        UserError: something given is wrong.
    """
    with contextlib.suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    check_writable(Path(path))
    config = configure("LlamaRec", *arguments, **options)
    begin_log(config)
    recommender, train_data, _, _ = _prepare(config, None, _trains_stage(None, None))
    init_seed(config["seed"], config["reproducibility"])
    return pairs.export(Path(path), recommender, train_data, config["show_progress"])
