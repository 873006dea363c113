"""RecBole's Config with our models, our properties, and every key and value checked before anything runs.

Priority, highest first, as in RecBole: command line, config_dict, config files (a later file wins), the preset,
defaults. Among the defaults: properties/dataset, then properties/model, then properties/overall, then RecBole's own.
For language models properties/model comes before properties/dataset.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import yaml

from recbole_ssm import __version__, compat
from recbole_ssm.arguments import PROPERTIES, TOY, YamlLoader, module_of, parse_options, plain, read_yaml, value_of
from recbole_ssm.declared import rows
from recbole_ssm.errors import UserError, did_you_mean, shown
from recbole_ssm.keys import KEYS, Key, row
from recbole_ssm.kinds import Anything
from recbole_ssm.synonyms import ALIASES, nearest, renamed

compat.install()

import recbole.config  # noqa: E402
from recbole.utils import InputType  # noqa: E402
from recbole.utils.argument_list import (  # noqa: E402
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_ssm import distributed  # noqa: E402
from recbole_ssm.conflicts import check_together  # noqa: E402
from recbole_ssm.data.gaps import reads_times  # noqa: E402

SETTINGS = "config.yaml"
"""The file in a run's folder that holds all its settings."""
RECBOLE_PROPERTIES = Path(recbole.__file__).parent / "properties"
# The keys that name columns, and the names by which our defaults and RecBole's speak of those columns.
FIELDS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "RATING_FIELD": "rating",
    "TIME_FIELD": "timestamp",
}
UNDECLARED = Key(Anything(), "model")
"""The row of a key that a user's own model reads and no file declares."""


class Configurable:
    """What Config asks of a model's class; these answers are those of RecBole's own models.

    A class of ours inherits them and gives its own.
    """

    model_name: str
    """The name that users type, where it is not the class's."""

    reads_text = False
    """Whether a language model reads the histories: batches and epochs are then the model's own on every data set."""

    hides_items = False
    """Whether the model can learn by ``train_mode: masked``."""

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
        model: name of one of our models or of a sequential model of RecBole's; or a class of the user's own, or its
            path as ``package.module:Class``. None leaves it to the options, and they to properties/overall.yaml.
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
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Iterable[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Iterable[str] = (),
        base: Mapping[str, Any] | None = None,
    ) -> None:
        self._find_model = find_model
        self.ranker: Config | None = None
        """The configuration of the ranker for which a first stage is trained."""
        self._command_line = list(command_line)
        self._base = {key: plain(key, value) for key, value in renamed(base or {}).items()}
        try:
            super().__init__(model, dataset, config_file_list, dict(config_dict or {}))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
            # RecBole's own checks, which name the key but reach the user as a traceback.
            raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error

    # --- reading options -----------------------------------------------------------------------------------------

    def _init_parameters_category(self) -> None:
        # RecBole appends to these module-level lists at every Config
        categories = (general_arguments, training_arguments, evaluation_arguments, dataset_arguments)
        names = ("General", "Training", "Evaluation", "Dataset")
        self.parameters = {name: list(keys) for name, keys in zip(names, categories)}

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return YamlLoader

    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for file in file_list or ():
            options.update(_by_new_names(read_yaml(Path(file))))
        return options

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        # RecBole calls eval on every string.
        values = {key: value_of(key, value) if isinstance(value, str) else value for key, value in config_dict.items()}
        return _by_new_names(values)

    def _load_cmd_line(self) -> dict[str, Any]:
        return _by_new_names(parse_options(self._command_line))

    def _merge_external_config_dict(self) -> None:
        super()._merge_external_config_dict()
        given = {key: plain(key, value) for key, value in self.external_config_dict.items()}
        former = self._base.get("preset")
        name = given.get("preset", former)
        # The options of a run that goes on hold those of its preset.
        self._preset = {} if name == former else _preset(name)
        self.external_config_dict: dict[str, Any] = {**self._base, **self._preset, **given}

    @property
    def class_path(self) -> str | None:
        """``package.module:Class`` of a user's own model; None of one that is known by its name."""
        kind = self.model_class
        return f"{module_of(kind)}:{kind.__qualname__}" if _is_own(kind) else None

    @property
    def own_files(self) -> dict[str, Path]:
        """The files of a user's own model by their modules: of its class, and of the user's classes that it extends."""
        return {kind.__module__: Path(inspect.getfile(kind)) for kind in self.model_class.__mro__ if _is_own(kind)}

    @property
    def changed(self) -> dict[str, Any]:
        """What is given and is not the default of this model on this data set; model and data set are left out."""
        defaults = self.internal_config_dict
        given = {key: value for key, value in self.external_config_dict.items() if key not in ("model", "dataset")}
        return {key: value for key, value in given.items() if key not in defaults or defaults[key] != value}

    def as_yaml(self) -> str:
        """All settings, in a form that ``--config_files`` takes; where they were left open, as they were chosen."""
        known = self.known_keys()
        chosen = {key: self.final_config_dict[key] for key in ("train_mode", "packed_window")}
        named = {"model": self.class_path or self.model, "dataset": self.dataset}
        settings = {key: value for key, value in {**self._settings, **chosen, **named}.items() if key in known}
        # An own model may have defaults that YAML cannot hold.
        plain_settings = json.loads(json.dumps(settings, default=str))
        text = yaml.safe_dump(plain_settings, sort_keys=False, allow_unicode=True)
        versions = f"recbole_ssm {__version__}, PyTorch {torch.__version__}"
        return f"# All settings of a run of {versions}. They train it again: --config_files {SETTINGS}\n{text}"

    @property
    def _rules(self) -> type[Configurable]:
        return self.model_class if issubclass(self.model_class, Configurable) else Configurable

    # --- defaults ------------------------------------------------------------------------------------------------

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, Any, str]:
        named = {**_shipped(PROPERTIES / "overall.yaml"), **self.external_config_dict}
        model, dataset = model or named["model"], KEYS["dataset"].take("dataset", dataset or named["dataset"])
        if dataset is None:
            raise UserError("dataset: must be the name of a data set, got None")
        if Path(dataset).name != dataset:
            raise UserError(f"dataset: '{dataset}' is a path; give its folder as data_path and its name as dataset")
        of = self._preset.get("model", model)
        if isinstance(model, str) and model != of and ":" not in model:
            raise UserError(f"preset: {named['preset']} is of {of}, and the model is {model}; leave one out")
        if isinstance(model, type):
            return vars(model).get("model_name", model.__name__), model, dataset
        name = KEYS["model"].take("model", model)
        assert isinstance(name, str)
        found = self._find_model(name)
        # A class that is named by its path goes by its own name.
        return vars(found).get("model_name", found.__name__) if ":" in name else name, found, dataset

    def _update_internal_config_dict(self, file: str | Path) -> dict[str, Any]:
        found = _shipped(Path(file))
        self.internal_config_dict.update(found)
        return found

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        parent = _known_name(model, model_class)
        super()._load_internal_config_dict(parent, model_class, dataset)
        defaults = self.internal_config_dict
        own_load_col = defaults["load_col"]
        own_file = _own_file(model_class)
        of_model = [PROPERTIES / f"model/{parent}.yaml", *([own_file] if own_file else [])]
        of_dataset = [PROPERTIES / f"dataset/{dataset}.yaml"]
        # A data set's batches and epochs are sized for embeddings of items, not for language models.
        later = [*of_dataset, *of_model] if self._rules.reads_text else [*of_model, *of_dataset]
        for file in [PROPERTIES / "overall.yaml", *later]:
            if file.is_file():
                self._update_internal_config_dict(file)
        defaults.update(getattr(model_class, "default_config", {}))
        if not hasattr(model_class, "input_type"):
            # RecBole reads from the loss what the rows of a batch hold.
            defaults.setdefault("loss_type", "CE")
        if own_load_col and len(own_load_col) > 1:
            # A model that reads features of items or users.
            defaults["load_col"] = own_load_col
        loss_type = self.external_config_dict.get("loss_type", defaults.get("loss_type"))
        samples_none = loss_type not in (None, "BPR") or self._rules.reads_text
        if samples_none:
            # RecBole's default samples negatives, and then refuses to run.
            defaults["train_neg_sample_args"] = None
        files_of_model = [RECBOLE_PROPERTIES / f"model/{parent}.yaml", *of_model]
        texts = [file.read_text(encoding="utf-8") for file in files_of_model if file.is_file()]
        self.rows: dict[str, Key] = rows(defaults, *texts)

    def _get_final_config_dict(self) -> dict[str, Any]:
        # A refused key may stand in a file of RecBole's, if it is left empty.
        refused = self.rows.keys() - self.known_keys()
        given = {key: value for key, value in self.external_config_dict.items() if value or key not in refused}
        self.external_config_dict = {key: self._checked(key, value) for key, value in given.items()}
        merged: dict[str, Any] = super()._get_final_config_dict()
        if "load_col" not in self.external_config_dict:
            merged["load_col"] = _by_field_names(merged)
        # Entries of eval_args that are not given keep their defaults; RecBole falls back to an order that it refuses.
        merged["eval_args"] = {**self.internal_config_dict["eval_args"], **(merged["eval_args"] or {})}
        if not reads_times(merged.get("time")) and "time" in merged:
            # The text means the same, and what is kept with a model is compared.
            merged["time"] = None
        check_together(merged)
        self._rules.check_options(merged, self._find_model)
        # RecBole changes some of them from here on.
        self._settings = copy.deepcopy(merged)
        return copy.deepcopy(merged)

    def _set_default_parameters(self) -> None:
        folder = Path(str(self.final_config_dict["data_path"])) / self.dataset
        super()._set_default_parameters()
        if self.dataset != "ml-100k" or (folder / f"{self.dataset}.inter").is_file():
            # RecBole sends ml-100k to its bundled copy, whatever data_path says; the toy comes along with us.
            own = self.dataset == TOY.name and not os.path.isdir(folder)
            self.final_config_dict["data_path"] = str(TOY if own else folder)
        # RecBole knows the losses CE and BPR only.
        self.final_config_dict.setdefault("MODEL_INPUT_TYPE", InputType.POINTWISE)
        self._set_train_mode()

    def _set_train_mode(self) -> None:
        """Packed wherever the model can learn from all positions at once, unless something else is asked for."""
        options = self.final_config_dict
        mode = options["train_mode"]
        refusal = None if mode == "masked" else self._rules.all_positions_refusal(options)
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
        if mode == "masked" and not self._rules.hides_items:
            refusal = f"{self.model} does not learn from hidden items; Hydra4Rec does"
        if refusal and mode in ("packed", "masked"):
            raise UserError(f"train_mode: {mode} is not possible, because {refusal}; take train_mode: prefix")
        options["train_mode"] = mode or ("prefix" if refusal else "packed")

    def _init_device(self) -> None:
        if distributed.launched():
            self.final_config_dict["device"] = distributed.start(
                bool(self.final_config_dict["use_gpu"]) and torch.cuda.is_available()
            )
            # Several processes do not work together as RecBole's do, so it is told that there is one.
            self.final_config_dict |= {"single_spec": True, "local_rank": distributed.rank()}
            if distributed.rank():
                self.final_config_dict |= {"state": "ERROR", "show_progress": False, "log_wandb": False}
            return
        if "gpu_id" not in self.external_config_dict and "CUDA_VISIBLE_DEVICES" in os.environ:
            # RecBole overwrites the user's own choice of GPUs with its default.
            self.final_config_dict["gpu_id"] = os.environ["CUDA_VISIBLE_DEVICES"]
        if isinstance(self.final_config_dict["gpu_id"], list):
            self.final_config_dict["gpu_id"] = tuple(self.final_config_dict["gpu_id"])
        if self.final_config_dict["use_gpu"]:
            super()._init_device()
        else:
            # RecBole would keep to use_gpu by hiding all GPUs, and so from everything else in this process too.
            self.final_config_dict |= {"device": torch.device("cpu"), "single_spec": True, "local_rank": 0}

    # --- checks --------------------------------------------------------------------------------------------------

    def known_keys(self) -> set[str]:
        """Every key that may be given for this model."""
        return {key for key, found in self.rows.items() if not found.refused}

    def _checked(self, key: str, value: Any) -> Any:
        found = self.rows.get(key) or (row(key) if str(key).startswith("alias_of_") else None)
        if key in self._base and self._base[key] == value and not (found and found.refused):
            # It has run with that value, and goes on with it.
            return value
        near = "" if found else nearest(str(key), self.known_keys(), other_words=self.class_path is None)
        if found is None and (near or self.class_path is None):
            raise UserError(f"{key}: there is no such key{near}")
        found = found or UNDECLARED
        return found.take(key, value, self.internal_config_dict.get(key))


def _preset(name: Any) -> Mapping[str, Any]:
    """The settings of a preset by its name; None has none.

    Raises:
        UserError: there is none.
    """
    if KEYS["preset"].take("preset", name) is None:
        return {}
    folder = PROPERTIES / "preset"
    known = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]
    if name not in known:
        hint = did_you_mean(str(name), known) or f"; known are {', '.join(known)}"
        raise UserError(f"preset: there is no preset {shown(name)}{hint}")
    return _shipped(folder / f"{name}.yaml")


@cache
def _shipped(path: Path) -> dict[str, Any]:
    """A YAML file of RecBole's or ours, which is read once in a process; nobody may change what it holds."""
    return read_yaml(path)


def _by_field_names(options: Mapping[str, Any]) -> Any:
    """The default ``load_col``, with users, items, ratings and times under the names that the keys of fields give."""
    names = {name: options[key] for key, name in FIELDS.items()}
    loaded = options["load_col"] or {}
    return {
        part: columns if columns == "*" else [names.get(column, column) for column in columns]
        for part, columns in loaded.items()
    } or None


def _known_name(model: str, model_class: type) -> str:
    """The name of the model whose files of defaults count: this one, or the nearest parent that has some."""
    for kind in model_class.__mro__:
        name = model if kind is model_class else vars(kind).get("model_name", kind.__name__)
        if any((folder / f"model/{name}.yaml").is_file() for folder in (PROPERTIES, RECBOLE_PROPERTIES)):
            return name
    return model


def _own_file(model_class: type) -> Path | None:
    """The YAML file of a user's own class, ``<Class>.yaml`` beside its module."""
    source = getattr(sys.modules.get(model_class.__module__), "__file__", None)
    if source is None or not _is_own(model_class):
        return None
    return Path(source).with_name(f"{model_class.__name__}.yaml")


def _is_own(model_class: type) -> bool:
    """Whether a user wrote the class, which may also be what a model extends."""
    others = ("abc", "builtins", "recbole", "recbole_ssm", "torch", "typing")
    return model_class.__module__.partition(".")[0] not in others


def _by_new_names(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in ALIASES.keys() & options:
        _hint(name)
    return renamed(options)


@cache
def _hint(name: str) -> None:
    """Say once how a key is called now."""
    getLogger().warning(f"{name}: its name is {ALIASES[name]} now; the old one still counts")
