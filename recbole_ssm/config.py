"""RecBole's Config with our models, our properties, and every key and value checked before anything runs.

Priority, highest first, as in RecBole: command line, config_dict, config files (a later file wins), defaults. Among the
defaults: properties/dataset, then properties/model, then properties/overall, then RecBole's own. For language models
properties/model comes before properties/dataset.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from recbole_ssm import compat
from recbole_ssm.arguments import literal, parse_options
from recbole_ssm.errors import UserError, did_you_mean

compat.install()

import recbole.config  # noqa: E402
from recbole.evaluator import metric_types  # noqa: E402
from recbole.utils import EvaluatorType, InputType  # noqa: E402
from recbole.utils.argument_list import (  # noqa: E402
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_ssm import distributed  # noqa: E402
from recbole_ssm.data import temporal  # noqa: E402
from recbole_ssm.ops.backend import BACKENDS  # noqa: E402
from recbole_ssm.optim import LEARNERS, adaptive_batch  # noqa: E402

_beside_the_package = Path(__file__).parent / "properties"
PROPERTIES = _beside_the_package if _beside_the_package.is_dir() else Path(__file__).parent.parent / "properties"

CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("CE", "BPR", "sampled_softmax", "gBCE"),
    "train_mode": (None, "packed", "prefix"),
    "adaptive_batch": (None, *adaptive_batch.RULES),
    "lr_scheduler_interval": ("epoch", "step"),
    "learner": tuple(LEARNERS),
    "residual": ("auto", True, False),
    "readout": ("last", "mean"),
    "ssm_backend": BACKENDS,
    "on_bad_lines": ("error", "skip"),
    "base_model_dtype": ("auto", "float32", "bfloat16"),
    "verbalizer": ("letters", "title_likelihood", "embedding"),
    "train_objective": ("sft", "orpo"),
    "orpo_rejected": ("random", "hardest", "all"),
    "orpo_probabilities": ("vocabulary", "letters"),
    "train_candidates": ("random", "insert", "skip"),
    "rerank": ("all", "retrieved"),
}
AT_LEAST_ONE = (
    "epochs", "train_batch_size", "eval_batch_size", "eval_step", "MAX_ITEM_LIST_LENGTH", "num_layers", "num_negatives",
    "packed_window", "gradient_accumulation_steps", "checkpoint_steps", "checkpoint_keep", "train_last", "train_rows",
    "eval_rows", "num_queries", "num_beams", "title_tokens", "prompt_history", "prompt_tokens", "prompt_batch_tokens",
)  # fmt: skip
MAY_BE_EMPTY = ("train_last",)  # whatever a model's own default is
REFUSED = {
    "dataset_save_path": "a saved data set is a pickle, and loading one runs the code in it",
    "dataloaders_save_path": "saved data loaders are a pickle, and loading one runs the code in it",
    "save_dataset": "it would be a pickle, and loading one runs the code in it",
    "save_dataloaders": "they would be a pickle, and loading one runs the code in it",
    "config_file": "options are read from config_files",
    "MODEL_TYPE": "it follows from the model",
}
# Keys that RecBole reads but for which it ships no default.
UNLISTED = {
    "model", "dataset", "encoding", "reg_weight", "discretization", "normalize_field",
    "local_rank", "nproc", "world_size", "offset", "ip", "port", "single_spec", "tensorboard",
    "MASK_ITEM_SEQ", "MASK_INDEX", "POS_ITEMS", "NEG_ITEMS", "CROP_ITEM_SEQ", "CROP_ITEM_SEQ_LEN",
    "INVERSE_ITEM_SEQ", "REORDER_ITEM_SEQ", "eta", "beta", "mask_ratio", "drop_cold_targets",
}  # fmt: skip
# eval_args.split: RecBole's ratios, leave-one-out and ratios before a moment, and our split by two moments.
SPLITS = {"RS": (), "LS": ("valid_and_test", "valid_only", "test_only"), "TS": (), temporal.NAME: ()}
NESTED = {
    "eval_args": ("split", "order", "group_by", "mode"),
    "train_neg_sample_args": ("distribution", "sample_num", "alpha", "dynamic", "candidate_num"),
}


class _Loader(yaml.SafeLoader):
    """YAML without code, which reads 1e-3 as a number as RecBole does; no process-wide loader is changed."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class Configurable:
    """What Config asks of a model's class; these answers are those of RecBole's own models.

    A class of ours inherits them and gives its own.
    """

    loss_types: tuple[str, ...] = ("CE", "BPR")
    """What ``loss_type`` may be, where the model has that key."""
    reads_text = False
    """Whether a language model reads the histories: batches and epochs are then the model's own on every data set."""

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """Why this model cannot learn from all positions of a history in one pass; None if it can."""
        return f"{config['model']} is RecBole's own, which reads one position of a row"

    @staticmethod
    def window_and_context(max_length: int, window: int | None) -> tuple[int | None, int | None]:
        """Targets and context of a training window, where a history is too long to be one; None: no windows."""
        return window, None

    @staticmethod
    def check_options(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
        """Refuse options that are right one by one and cannot work together, with a UserError."""


class Config(recbole.config.Config):
    """The configuration of one run; :func:`recbole_ssm.quick_start.configure` makes one that knows our models.

    Args:
        find_model: the class of a model's name; a name that it does not know is a UserError.
        model: name of one of our models or of a sequential model of RecBole's; None leaves it to the options, and they
            to properties/overall.yaml.
        dataset: name of the data set; None likewise.
        config_file_list: YAML files.
        config_dict: options as a dict.
        command_line: options as ``["--key=value", ...]``. RecBole reads ``sys.argv`` here; a library must not.
        base: options that all the others win over, ``model`` and ``dataset`` among them: those of a run to go on with.

    Raises:
        UserError: an unknown key or name, an impossible value, or an unreadable file.
    """

    def __init__(
        self,
        find_model: Callable[[str], type],
        model: str | None = None,
        dataset: str | None = None,
        config_file_list: Iterable[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Iterable[str] = (),
        base: Mapping[str, Any] | None = None,
    ) -> None:
        self._find_model = find_model
        self._command_line = list(command_line)
        self._base = dict(base or {})
        try:
            super().__init__(model, dataset, config_file_list, dict(config_dict or {}))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as error:
            # RecBole's own checks, which name the key but reach the user as a traceback
            raise UserError(str(error.args[0] if error.args else error)) from error

    # --- reading options -----------------------------------------------------------------------------------------

    def _init_parameters_category(self) -> None:
        # RecBole appends to these module-level lists at every Config
        categories = (general_arguments, training_arguments, evaluation_arguments, dataset_arguments)
        names = ("General", "Training", "Evaluation", "Dataset")
        self.parameters = {name: list(keys) for name, keys in zip(names, categories)}

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return _Loader

    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        options = dict(self._base)
        for file in file_list or ():
            options.update(read_yaml(Path(file)))
        return options

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        # RecBole calls eval on every string
        return {key: literal(value) if isinstance(value, str) else value for key, value in config_dict.items()}

    def _load_cmd_line(self) -> dict[str, Any]:
        return parse_options(self._command_line)

    @property
    def _rules(self) -> type[Configurable]:
        return self.model_class if issubclass(self.model_class, Configurable) else Configurable

    # --- defaults ------------------------------------------------------------------------------------------------

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple[str, Any, str]:
        named = {**read_yaml(PROPERTIES / "overall.yaml"), **self.external_config_dict}
        model, dataset = model or named["model"], dataset or named["dataset"]
        for key, value in (("model", model), ("dataset", dataset)):
            if not isinstance(value, str):
                raise UserError(f"{key}: must be a name, got {value!r}")
        assert isinstance(model, str) and isinstance(dataset, str)
        if Path(dataset).name != dataset:
            raise UserError(f"dataset: '{dataset}' is a path; give its folder as data_path and its name as dataset")
        return model, self._find_model(model), dataset

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        defaults = self.internal_config_dict
        own_load_col = defaults["load_col"]
        files = ["overall.yaml", f"model/{model}.yaml", f"dataset/{dataset}.yaml"]
        if self._rules.reads_text:
            files[1:] = files[:0:-1]  # a data set's batches and epochs are sized for embeddings of items
        for file in files:
            if (PROPERTIES / file).is_file():
                defaults.update(read_yaml(PROPERTIES / file))
        if own_load_col and len(own_load_col) > 1:  # a model that reads features of items or users
            defaults["load_col"] = own_load_col
        loss_type = self.external_config_dict.get("loss_type", defaults.get("loss_type"))
        samples_none = loss_type not in (None, "BPR") or self._rules.reads_text
        if samples_none:  # RecBole's default samples negatives, and then refuses to run
            defaults["train_neg_sample_args"] = None

    def _get_final_config_dict(self) -> dict[str, Any]:
        self._check_keys()
        merged: dict[str, Any] = super()._get_final_config_dict()
        # entries of eval_args that are not given keep their defaults; RecBole falls back to an order that it refuses
        merged["eval_args"] = {**self.internal_config_dict["eval_args"], **_mapping("eval_args", merged["eval_args"])}
        self._check_values(merged)
        return copy.deepcopy(merged)

    def _set_default_parameters(self) -> None:
        folder = Path(str(self.final_config_dict["data_path"])) / self.dataset
        super()._set_default_parameters()
        if self.dataset != "ml-100k" or (folder / f"{self.dataset}.inter").is_file():
            # RecBole sends ml-100k to its bundled copy, whatever data_path says
            self.final_config_dict["data_path"] = str(folder)
        self.final_config_dict.setdefault("MODEL_INPUT_TYPE", InputType.POINTWISE)  # RecBole knows CE and BPR alone
        self._set_train_mode()

    def _set_train_mode(self) -> None:
        """Packed wherever the model can learn from all positions at once, unless something else is asked for."""
        options = self.final_config_dict
        refusal = self._rules.all_positions_refusal(options)
        options["packed_window"], options["packed_context"] = self._rules.window_and_context(
            options["MAX_ITEM_LIST_LENGTH"], options["packed_window"]
        )
        if options["transform"] is not None:
            refusal = f"transform: {options['transform']} changes prefixes one by one"
        negatives = options["train_neg_sample_args"] or {}
        if negatives.get("sample_num", 1) != 1 or negatives.get("dynamic"):
            refusal = "train_neg_sample_args asks for more than one plain negative a target"
        if options["benchmark_filename"] is not None:
            refusal = "benchmark_filename names files whose prefixes are written out"
        if refusal and options["train_mode"] == "packed":
            raise UserError(f"train_mode: packed is not possible, because {refusal}; take train_mode: prefix")
        options["train_mode"] = options["train_mode"] or ("prefix" if refusal else "packed")

    def _init_device(self) -> None:
        if distributed.launched():
            self.final_config_dict["device"] = distributed.start(
                bool(self.final_config_dict["use_gpu"]) and torch.cuda.is_available()
            )
            # what RecBole does with several processes is not what is done here, so it is told of one
            self.final_config_dict |= {"single_spec": True, "local_rank": distributed.rank()}
            if distributed.rank():
                self.final_config_dict |= {"state": "ERROR", "show_progress": False}
            return
        if "gpu_id" not in self.external_config_dict and "CUDA_VISIBLE_DEVICES" in os.environ:
            # RecBole overwrites the user's own choice of GPUs with its default
            self.final_config_dict["gpu_id"] = os.environ["CUDA_VISIBLE_DEVICES"]
        if self.final_config_dict["use_gpu"] or "local_rank" in self.final_config_dict:
            super()._init_device()
        else:  # RecBole's default device ignores use_gpu; to hide all GPUs would hide them from the process
            self.final_config_dict |= {"device": torch.device("cpu"), "single_spec": True, "local_rank": 0}

    # --- checks --------------------------------------------------------------------------------------------------

    def known_keys(self) -> set[str]:
        """Every key that this model knows."""
        return set(self.internal_config_dict) | UNLISTED | {key for keys in self.parameters.values() for key in keys}

    def _check_keys(self) -> None:
        known = self.known_keys()
        for key in self.external_config_dict:
            if key not in known and not str(key).startswith("alias_of_"):
                raise UserError(f"{key}: there is no such key{did_you_mean(str(key), known - set(REFUSED))}")
            if self.external_config_dict[key] and key in REFUSED:
                raise UserError(f"{key}: refused, because {REFUSED[key]}; leave it empty")
        for key, names in NESTED.items():
            for name in _mapping(key, self.external_config_dict.get(key)):
                if name not in names:
                    raise UserError(f"{key}: there is no such entry '{name}'{did_you_mean(str(name), names)}")

    def _check_values(self, merged: dict[str, Any]) -> None:
        for key, default in self.internal_config_dict.items():
            value = merged[key]
            if key in CHOICES or (value is None and key in MAY_BE_EMPTY):
                continue
            if isinstance(default, bool):
                fits, kind = isinstance(value, bool), "True or False"
            elif isinstance(default, int):
                fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
            elif isinstance(default, float):
                fits, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
            else:
                continue
            if not fits:
                raise UserError(f"{key}: must be {kind}, got {value!r}; the default is {default!r}")
        for key, choices in CHOICES.items():
            value = merged.get(key)
            if key in self.internal_config_dict and value not in choices:
                hint = did_you_mean(str(value), [str(choice) for choice in choices])
                raise UserError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}{hint}")
        for key in AT_LEAST_ONE:
            value = merged.get(key)
            if value is not None and not isinstance(value, int):
                raise UserError(f"{key}: must be a whole number, got {value!r}; try {key}: 1")
            if value is not None and value < 1:
                raise UserError(f"{key}: must be at least 1, got {value}; try {key}: 1")
        for key, value in merged.items():
            if key.endswith("dropout_prob") and not 0 <= value < 1:
                raise UserError(f"{key}: must lie in [0, 1), got {value}; try {key}: 0.2")
        known_losses = self._rules.loss_types
        if merged.get("loss_type") not in (None, *known_losses):
            known = " and ".join(known_losses)
            raise UserError(f"loss_type: {self.model} is RecBole's own and knows {known}, got {merged['loss_type']}")
        own_samples = merged.get("loss_type") in ("sampled_softmax", "gBCE")
        if own_samples and merged["train_neg_sample_args"] is not None:
            raise UserError(
                f"train_neg_sample_args: {merged['loss_type']} draws its own samples; set num_negatives instead"
            )
        if merged.get("gbce_t") is not None and not 0 <= merged["gbce_t"] <= 1:
            raise UserError(f"gbce_t: must lie in [0, 1], got {merged['gbce_t']}; try gbce_t: 0.75")
        if merged.get("negative_power") is not None and merged["negative_power"] < 0:
            raise UserError(
                f"negative_power: must be 0 or more, got {merged['negative_power']}; try negative_power: 0.75"
            )
        if merged["learning_rate"] <= 0:
            raise UserError(f"learning_rate: must be above 0, got {merged['learning_rate']}; try learning_rate: 0.001")
        if merged["eval_args"]["order"] != "TO":
            raise UserError(
                f"eval_args: order must be TO (by time) for sequences, got {merged['eval_args']['order']!r}"
            )
        self._check_split(merged["eval_args"]["split"])
        if merged.get("loss_type") == "BPR" and merged["train_neg_sample_args"] is None:
            raise UserError("train_neg_sample_args: BPR needs negative samples, got None; leave the key out")
        self._check_metrics(merged)
        self._rules.check_options(merged, self._find_model)

    @staticmethod
    def _check_split(split: Any) -> None:
        if not isinstance(split, dict) or len(split) != 1:
            raise UserError(f"eval_args: split must be one entry such as {{'LS': 'valid_and_test'}}, got {split!r}")
        name, value = next(iter(split.items()))
        if name not in SPLITS:
            raise UserError(f"eval_args: there is no split {name!r}; known are {', '.join(SPLITS)}")
        if name == temporal.NAME:
            temporal.check_parts(value)
        elif name == "LS" and value not in SPLITS["LS"]:
            raise UserError(f"eval_args: LS must be one of {', '.join(SPLITS['LS'])}, got {value!r}")

    @staticmethod
    def _check_metrics(merged: dict[str, Any]) -> None:
        metrics = [merged["metrics"]] if isinstance(merged["metrics"], str) else merged["metrics"]
        cutoffs = [merged["topk"]] if isinstance(merged["topk"], int) else merged["topk"]
        for metric in metrics:
            if str(metric).lower() not in metric_types:
                raise UserError(f"metrics: there is no metric '{metric}'{did_you_mean(str(metric), metric_types)}")
        name, _, cutoff = str(merged["valid_metric"]).partition("@")
        ranking_metrics = {m for m, kind in metric_types.items() if kind == EvaluatorType.RANKING} - {"gauc"}
        if name.lower() not in {str(metric).lower() for metric in metrics}:
            raise UserError(f"valid_metric: '{merged['valid_metric']}' is not among metrics: {metrics}; add it there")
        if name.lower() in ranking_metrics and not (cutoff.isdigit() and int(cutoff) in cutoffs):
            raise UserError(
                f"valid_metric: '{merged['valid_metric']}' needs its cut-off in topk: {cutoffs}; add it there"
            )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: there is no such file, it is no YAML, or it holds something else than a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"config file {path}{where}: not valid YAML: {problem}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config file {path}: must hold 'key: value' lines, got {type(content).__name__}")
    return content or {}


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: must be a mapping such as {{'{NESTED[key][0]}': ...}}, got {value!r}")
    return value
