"""The config keys, a row each: what a key accepts, what it belongs to, and what may be done with it.

To add a key for every model, write its row here and its default in properties/overall.yaml. A key of one model needs
no row: it is read from its line in properties/model/<Model>.yaml, whose comment says the type, what the key means and,
where the type and the size of the default do not say it, a range::

    head_dim: 64   # (int) Channels of a head. Range in [1, inf).

``recbole-ssm keys`` prints the table, and docs/keys.md is written from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from recbole_ssm.errors import UserError
from recbole_ssm.kinds import (
    AT_LEAST_1,
    COLUMN,
    COLUMNS,
    FLAG,
    LAYERS,
    NAME,
    NAME_PATTERN,
    NONE,
    NOT_NEGATIVE,
    OPTIONS,
    PART,
    POSITIVE,
    Choice,
    Either,
    Fields,
    Filter,
    Flag,
    Kind,
    KindError,
    Many,
    Number,
    Only,
    Split,
    Table,
    Text,
    whole_number,
)

# --- the rows ---


class Span(NamedTuple):
    """A range to search for a number in."""

    low: float
    high: float
    log: bool = False
    """Whether to search it by orders of magnitude."""


Scope = Literal["data", "model", "training", "evaluation", "run", "machine"]
SCOPES: dict[Scope, str] = {
    "data": "what data there is, and how it is split",
    "model": "what the model computes",
    "training": "how its weights are learned",
    "evaluation": "what is measured, and on which rows",
    "run": "how a run is started, kept and shown",
    "machine": "where it runs",
}
Effect = Literal["result", "free", "none"]


@dataclass(frozen=True)
class Key:
    """One row."""

    kind: Kind
    scope: Scope
    about: str = ""
    """One sentence; for a model's key it stands in properties/model."""
    effect: Effect = "result"
    """``result``: the key changes results, and a resumed run must keep it. ``free``: it changes results or what is
    reported of them, and a resumed run may change it. ``none``: it changes no result, and a resumed run may change it.
    """
    tune: Span | tuple[Any, ...] | None = None
    """Where a search for good values looks: a span of numbers, or these values."""
    empty: bool = False
    """Whether None is accepted."""
    refused: str = ""
    """Why a user may not give the key, which stands in the table because RecBole knows it."""
    named: bool = False
    """Whether a study's table says the key's value even where nobody gave it."""

    @property
    def result(self) -> bool:
        """Whether the key changes results."""
        return self.effect != "none"

    @property
    def free(self) -> bool:
        """Whether a resumed run may change the key."""
        return self.effect != "result"

    @property
    def tunable(self) -> bool:
        """Whether values may be compared by their scores; with others of these keys a score means something else."""
        return self.tune is not None or self.scope in ("model", "training")

    def __str__(self) -> str:
        return f"empty, or {self.kind}" if self.empty else str(self.kind)

    def take(self, name: str, value: Any, default: Any = None) -> Any:
        """The value as the configuration keeps it.

        Raises:
            UserError: the key does not accept it.
        """
        if self.refused:
            raise UserError(f"{name}: refused, because {self.refused}; leave it empty")
        if (value is None and self.empty) or (type(value) is type(default) and value == default):
            return value
        try:
            return self.kind.take(value)
        except KindError as error:
            text = str(error)
        if isinstance(self.kind, Choice) and self.empty:
            text = text.replace("is not one of ", "is not one of None, ", 1)
        raise UserError(f"{name}: {text}{self._mend(name, value, default)}")

    def _mend(self, name: str, value: Any, default: Any) -> str:
        """What to try in place of a number, True or False."""
        if not isinstance(self.kind, (Number, Flag)):
            return ""
        right_type = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(self.kind, Number) and (right_type or default is None):
            low = self.kind.range.low
            example = f"{low:.12g}" if low >= 1 and self.kind.range.has_low else default
            empty = ", or leave it empty" if self.empty else ""
            return f"; try {name}: {example}{empty}" if example is not None else empty.replace(", or", ";")
        return "" if default is None else f"; the default is {default!r}"


_DECIMALS = whole_number("[0, 20]")

_SCHEDULER = Text("'cosine', 'one_cycle' or the name of a class of torch.optim.lr_scheduler")
# PyTorch's schedulers find a wrong value of these only in the midst of a run, or never.
_SCHEDULER_ARGS = Fields(
    {
        **dict.fromkeys(
            ("step_size", "T_max", "T_0", "T_mult", "total_steps", "epochs", "steps_per_epoch"), AT_LEAST_1
        ),
        **dict.fromkeys(("step_size_up", "total_iters"), AT_LEAST_1),
        **dict.fromkeys(("gamma", "factor", "power", "start_factor", "end_factor", "threshold"), Number()),
        **dict.fromkeys(("patience", "cooldown"), whole_number("[0, inf)")),
        "milestones": Many(AT_LEAST_1),
    },
    "{'max_lr': 0.01, 'total_steps': 1000}",
    open=True,
)
_CLIP = Fields(
    {
        "max_norm": POSITIVE,
        "norm_type": Either(POSITIVE, Choice("inf", math.inf)),
        "error_if_nonfinite": FLAG,
        "foreach": Either(FLAG, NONE),
    },
    "{'max_norm': 5}",
    needs=("max_norm",),
)
_NEGATIVES = Fields(
    {
        "distribution": Choice("uniform", "popularity", "none", "None", None),
        "sample_num": Either(AT_LEAST_1, Choice("none")),
        "alpha": Either(Number(), Choice("none")),
        "dynamic": FLAG,
        "candidate_num": whole_number("[0, inf)"),
    }
)
_MODE = Text(
    "'full', 'labeled', or 'uni' or 'pop' with a number up to 10000 such as 'uni100'",
    r"full|labeled|(?:uni|pop)(?:[1-9]\d{0,3}|10000)",
)
_EVALUATION = Fields(
    {
        "split": Split(),
        "order": Only("TO", "TO (by time) for sequences"),
        "group_by": Choice("user", "none", None),
        "mode": Either(Fields({"valid": _MODE, "test": _MODE}), _MODE),
    }
)
_LEVEL = Text("one of debug, info, warning, error, critical", "(?i:debug|info|warning|error|critical)")
_GPUS = Either(
    Text("numbers of GPUs such as '0' or '0,1'", r"\s*|\d+(?:\s*,\s*\d+)*"),
    whole_number("[0, inf)"),
    Many(whole_number("[0, inf)")),
)
_TRANSFORM = Choice("mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq")
_LEARNER = Choice("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam", "usgm", "usfgm")
_LOADED = Table(Either(Choice("*"), COLUMNS), "{'inter': ['user_id', 'item_id', 'timestamp']}", needs="inter")
_VALUES = Table(Filter(or_tokens=True), "{'rating': '[3,inf)'}")
_BUCKETS = Table(
    Fields({"method": Choice("ED", "LD"), "bucket": AT_LEAST_1}, needs=("method",)),
    "{'price': {'method': 'ED', 'bucket': 10}}",
)
_BASE = Text("a folder, a .gguf file, a name on the Hugging Face hub or 'random'")
_METRICS = Many(Text("the name of a metric", NAME_PATTERN), or_one=True, least=1)
_CHECKPOINT = Text("a file such as best.safetensors, or the folder of a run")
_PICKLE = "loading one runs the code in it"
_LAUNCHED = "torchrun starts several processes and numbers them"

# fmt: off
KEYS: dict[str, Key] = {
    # where it runs
    "data_path": Key(Text("a folder"), "machine", "The folder that holds a folder for each data set.", effect="none"),
    "checkpoint_dir": Key(Text("a folder"), "machine", "Where runs keep their checkpoints.", effect="none"),
    "gpu_id": Key(_GPUS, "machine", "The GPUs that may be used, by their numbers.", effect="none"),
    "use_gpu": Key(FLAG, "machine", "Use a GPU where there is one.", effect="none"),
    "worker": Key(whole_number("[0, 512]"), "machine", effect="none", about=
        "How many processes prepare batches beside the main one."),
    "device": Key(NAME, "machine", effect="none", refused="it follows from use_gpu and gpu_id"),
    "local_rank": Key(whole_number("[0, inf)"), "machine", effect="none", refused=_LAUNCHED),
    "nproc": Key(AT_LEAST_1, "machine", refused=_LAUNCHED),
    "world_size": Key(AT_LEAST_1, "machine", refused=_LAUNCHED),
    "offset": Key(whole_number("[0, inf)"), "machine", refused=_LAUNCHED),
    "ip": Key(NAME, "machine", refused=_LAUNCHED),
    "port": Key(NAME, "machine", refused=_LAUNCHED),
    "single_spec": Key(FLAG, "run", refused="it follows from how the run was started"),

    # how a run is started, kept and shown
    "model": Key(NAME, "run", "The model, ours or a sequential one of RecBole's."),
    "preset": Key(Text("a name such as ml-1m/2Mamba4Rec"), "run", effect="none", empty=True, about=
        "Settings that are shipped in properties/preset: above the other defaults, below config files and options. A "
        "preset names its model and its data set, unless others are given."),
    "seed": Key(whole_number("[0, 4294967295]"), "run", "Where all random numbers start."),
    "reproducibility": Key(FLAG, "run", "Let cuDNN choose only algorithms that give the same result each time."),
    "state": Key(_LEVEL, "run", effect="none", empty=True, about=
        "From which level on messages are shown; at INFO and below the log file keeps more."),
    "show_progress": Key(FLAG, "run", "Show a bar for each epoch, on a terminal or in a notebook.", effect="none"),
    "log_wandb": Key(FLAG, "run", "Log metrics to Weights & Biases.", effect="none"),
    "wandb_project": Key(NAME, "run", "The project there.", effect="none"),
    "checkpoint_steps": Key(AT_LEAST_1, "run", effect="none", empty=True, about=
        "Save a checkpoint every so many steps, besides the end of each epoch."),
    "checkpoint_keep": Key(AT_LEAST_1, "run", effect="none", about=
        "How many of the newest checkpoints stay, besides the best."),
    "measure_latency": Key(FLAG, "run", effect="free", about=
        "Time training steps and evaluation batches; a table in the log, and latency.json beside the checkpoints."),
    "ssm_backend": Key(Choice("auto", "reference", "torch", "native", "cuda"), "run", about=
        "The kernels of the state-space models."),
    "cuda_graphs": Key(Choice("auto", True, False), "run", effect="free", about=
        "On a GPU, replay training steps as CUDA graphs where that is possible; the first replays are compared with "
        "launched steps, which go on where they differ. True evaluates by graphs too, where padding is computed."),
    "config_file": Key(NAME, "run", refused="options are read from config_files"),
    "MODEL_TYPE": Key(NAME, "run", refused="it follows from the model"),
    "save_dataset": Key(FLAG, "run", refused=f'it would be a pickle, and {_PICKLE}'),
    "dataset_save_path": Key(NAME, "run", refused=f'a saved data set is a pickle, and {_PICKLE}'),
    "save_dataloaders": Key(FLAG, "run", refused=f'they would be a pickle, and {_PICKLE}'),
    "dataloaders_save_path": Key(NAME, "run", refused=f'saved data loaders are a pickle, and {_PICKLE}'),

    # how weights are learned
    "epochs": Key(whole_number("[0, inf)"), "training", effect="free", named=True, about=
        "The number of training epochs; 0 evaluates a model as it is."),
    "stopping_step": Key(whole_number("[0, inf)"), "training", effect="free", named=True, about=
        "Stop after more than so many validations without a better one."),
    "eval_step": Key(AT_LEAST_1, "training", "Validate after every so many epochs."),
    "train_batch_size": Key(AT_LEAST_1, "training", tune=(256, 512, 1024, 2048, 4096), named=True, about=
        "Targets in a batch."),
    "gradient_accumulation_steps": Key(whole_number(most=100_000), "training", about=
        "Parts into which a batch is cut, one after the other through the model: less memory, and the same step "
        "where the loss is a mean over targets."),
    "shuffle": Key(FLAG, "training", "Shuffle the training rows before each epoch."),
    "train_mode": Key(Choice("packed", "prefix", "masked"), "training", empty=True, named=True, about=
        "'packed': whole histories, a loss at every position. 'prefix': RecBole's rows, one loss each. 'masked': whole "
        "histories with hidden items, as BERT4Rec learns (Hydra4Rec alone). Empty: packed wherever the model allows "
        "it, else prefix."),
    "packed_context": Key(AT_LEAST_1, "training", refused="it follows from packed_window and the model"),
    "packed_window": Key(AT_LEAST_1, "training", empty=True, about=
        "Targets of one window of a history longer than MAX_ITEM_LIST_LENGTH. Empty: the model's own choice."),
    "train_last": Key(AT_LEAST_1, "training", empty=True, about=
        "Train on each user's newest so many targets only, with their whole histories. Empty: on all."),
    "train_newest": Key(AT_LEAST_1, "training", empty=True, named=True, about=
        "Train on each user's newest so many targets only, and let no history reach further back than the event before "
        "them: what the loaders of SASRec, BERT4Rec and their kin do with their maximal length. Empty: on all."),
    "train_rows": Key(AT_LEAST_1, "training", empty=True, about=
        "Train on so many targets, drawn once by the seed. Empty: on all."),
    "train_neg_sample_args": Key(_NEGATIVES, "training", "Negative samples for the loss BPR.", empty=True),
    "transform": Key(_TRANSFORM, "training", "How RecBole changes the histories of a batch.", empty=True),
    "mask_ratio": Key(Number("(0, 1]"), "training", tune=Span(0.1, 0.6), about=
        "The share of a history that 'mask_itemseq' and 'train_mode: masked' hide."),
    "ft_ratio": Key(Number("[0, 1]"), "training", about=
        "How often 'mask_itemseq' and 'train_mode: masked' hide the last item only."),
    "eta": Key(Number("(0, 1]"), "training", "The share of a history that 'crop_itemseq' keeps."),
    "beta": Key(Number("[0, 1]"), "training", "The share of a history that 'reorder_itemseq' shuffles."),
    "learner": Key(_LEARNER, "training", "The optimiser.", named=True),
    "learning_rate": Key(POSITIVE, "training", tune=Span(0.0001, 0.01, log=True), named=True, about=
        "The optimiser's learning rate."),
    "weight_decay": Key(NOT_NEGATIVE, "training", tune=(0.0, 1e-05, 0.0001, 0.001, 0.01), named=True, about=
        "The optimiser's weight decay."),
    "learner_args": Key(OPTIONS, "training", empty=True, about=
        "More arguments of the learner's class, such as {'betas': [0.9, 0.98]}; 'usgm' and 'usfgm' need {'D': 100, "
        "'rho': 0.01}."),
    "learner_groups": Key(Table(OPTIONS, "{'item_embedding*': {'D': 30}}"), "training", empty=True, about=
        "Options of some parameters, by a pattern of their names: {'item_embedding*': {'D': 30}}; the rest has "
        "learner_args."),
    "average_power": Key(NOT_NEGATIVE, "training", empty=True, named=True, about=
        "Validate, test and save the mean of the learner's iterates, in which iterate k weighs about k ** "
        "average_power: 0 is the plain mean, 8 about that of the last fifth of training. Empty: the last iterate."),
    "adaptive_batch": Key(Choice("hoelder", "norm_test", "inner_product"), "training", empty=True, about=
        "Let the batch size follow the gradient's noise: 'hoelder' (needs D), 'norm_test' or 'inner_product'; "
        "train_batch_size is the first."),
    "adaptive_batch_args": Key(OPTIONS, "training", empty=True, about=
        "Its options, such as {'D': 100, 'batch_max': 4096, 'every': 50}; recbole_ssm.optim.AdaptiveBatchSize lists"
        " them."),
    "lr_scheduler": Key(_SCHEDULER, "training", empty=True, named=True, about=
        "'cosine' or 'one_cycle' over all steps of all epochs, after a rise of lr_warmup; or a class of "
        "torch.optim.lr_scheduler, such as OneCycleLR."),
    "lr_warmup": Key(PART, "training", tune=(0.0, 0.05, 0.1), about=
        "The part of all steps in which 'cosine' and 'one_cycle' rise."),
    "lr_scheduler_args": Key(_SCHEDULER_ARGS, "training", empty=True, about=
        "Its arguments, such as {'max_lr': 0.01, 'total_steps': 1000}."),
    "lr_scheduler_interval": Key(Choice("epoch", "step"), "training", about=
        "When the scheduler steps: every 'epoch' or every 'step' of the optimiser."),
    "clip_grad_norm": Key(_CLIP, "training", "Shorten longer gradients: {'max_norm': 5}.", empty=True),
    "enable_amp": Key(FLAG, "training", "Train in mixed precision."),
    "amp_dtype": Key(Choice("bf16", "fp16"), "training", empty=True, about=
        "The half precision of enable_amp; 'fp16' wants enable_scaler. Empty: fp16 on a GPU, bf16 on a CPU."),
    "enable_scaler": Key(FLAG, "training", "Scale the loss in mixed precision, so that small gradients do not vanish."),
    "require_pow": Key(FLAG, "training", "Square the norm in RecBole's EmbLoss."),
    "loss_decimal_place": Key(_DECIMALS, "training", "Decimal places of the loss in the log.", effect="none"),

    # what is measured, and on which rows
    "metrics": Key(_METRICS, "evaluation", "Evaluation metrics."),
    "topk": Key(Many(AT_LEAST_1, or_one=True, least=1), "evaluation", "Cut-offs of the ranking metrics."),
    "valid_metric": Key(Text("a metric with its cut-off, such as NDCG@10 or masked NDCG@10", NAME_PATTERN),
        "evaluation", named=True, about="The metric that chooses the best epoch and, in a search, the best setting."),
    "valid_metric_bigger": Key(FLAG, "evaluation", "Whether more of it is better; RecBole knows it from the metric."),
    "tail_ratio": Key(Number("[0, 1]"), "evaluation", "The share of least popular items that TailPercentage counts."),
    "eval_rows": Key(AT_LEAST_1, "evaluation", empty=True, about=
        "Validate and test on so many rows (users, for leave-one-out), drawn once by the seed. Empty: on all."),
    "drop_cold_targets": Key(FLAG, "evaluation", about=
        "Leave out targets of validation and test that training never saw; the log counts them either way."),
    "eval_batch_size": Key(AT_LEAST_1, "evaluation", "Rows that are read and encoded at once.", effect="none"),
    "metric_decimal_place": Key(_DECIMALS, "evaluation", "Decimal places to which metrics are rounded.", effect="free"),
    "repeatable": Key(Only(True, "True, because the next item may be one of the history"), "evaluation", about=
        "Whether items of the history may be recommended."),

    # what data there is, and how it is split
    "dataset": Key(NAME, "data", "The data set."),
    "eval_args": Key(_EVALUATION, "data", about=
        "How rows are split and ranked; entries that are not given keep their defaults."),
    "legacy_time_order": Key(FLAG, "data", about=
        "Sort events by RecBole's float32 timestamps, 64 s and coarser, as published RecBole numbers did."),
    "ties": Key(Choice("file", "random"), "data", named=True, about=
        "How events of one user at one time are ordered: as in the 'file', which is RecBole's way, or at 'random'; a "
        "result that differs stands on the order of the file."),
    "ties_seed": Key(whole_number("[0, 4294967295]"), "data", about=
        "Draws the order of 'ties: random'. It is no part of 'seed', so that runs of several seeds share their data."),
    "on_bad_lines": Key(Choice("error", "skip"), "data", about=
        "A line of a data file that cannot be used stops the run, or is skipped, counted and kept in "
        "checkpoint_dir."),
    "MAX_ITEM_LIST_LENGTH": Key(AT_LEAST_1, "data", tune=(20, 50, 100, 200), named=True, about=
        "The longest history that a model sees."),
    "load_col": Key(_LOADED, "data", "The columns to read of each file.", empty=True),
    "unload_col": Key(Table(COLUMNS, "{'inter': ['rating']}"), "data", empty=True, about=
        "The columns of each file not to read."),
    "unused_col": Key(Table(COLUMNS, "{'inter': ['rating']}"), "data", empty=True, about=
        "The columns of each file that are read to filter by, and then dropped."),
    "additional_feat_suffix": Key(Many(Text("the end of a file's name"), or_one=True), "data", empty=True, about=
        "Other files to read, by the ends of their names."),
    "numerical_features": Key(COLUMNS, "data", "Columns of numbers that are embedded."),
    "seq_len": Key(Table(AT_LEAST_1, "{'genre': 5}"), "data", "Where lists in a column are cut.", empty=True),
    "field_separator": Key(Text("a separator"), "data", "What separates the columns of a file."),
    "seq_separator": Key(Text("a separator"), "data", "What separates the entries of a list in a column."),
    "encoding": Key(Text("an encoding such as utf-8"), "data", empty=True, about=
        "The encoding of the files; utf-8 if empty."),
    "rm_dup_inter": Key(Choice("first", "last", "same_time"), "data", empty=True, about=
        "Which of several events of one user and item stays; 'same_time': the first of those at one time. Empty: all."),
    "val_interval": Key(_VALUES, "data", "The values of a column whose rows stay.", empty=True),
    "filter_inter_by_user_or_item": Key(FLAG, "data", "Drop events of users and items that their files do not name."),
    "user_inter_num_interval": Key(Filter(), "data", "How many events a user must have to stay.", empty=True),
    "item_inter_num_interval": Key(Filter(), "data", "How many events an item must have to stay.", empty=True),
    "threshold": Key(Table(Number(), "{'rating': 3}", length=1), "data", empty=True, about=
        "Label events 1 where this column has at least this value, else 0."),
    "normalize_field": Key(COLUMNS, "data", "Columns of numbers to scale to [0, 1].", empty=True),
    "normalize_all": Key(FLAG, "data", "Scale all columns of numbers to [0, 1].", empty=True),
    "discretization": Key(_BUCKETS, "data", "How columns of numbers are put into buckets.", empty=True),
    "preload_weight": Key(Table(COLUMN, "{'item_id': 'item_emb'}"), "data", empty=True, refused=
        "no sequential model reads pretrained vectors"),
    "alias_of_user_id": Key(COLUMNS, "data", "Columns that hold users too.", empty=True),
    "alias_of_item_id": Key(COLUMNS, "data", "Columns that hold items too.", empty=True),
    "alias_of_entity_id": Key(COLUMNS, "data", "Columns that hold entities of a knowledge graph too.", empty=True),
    "alias_of_relation_id": Key(COLUMNS, "data", "Columns that hold relations of a knowledge graph too.", empty=True),
    "benchmark_filename": Key(Many(Text("a part of a file's name"), length=3), "data", empty=True, about=
        "Ready-made files for training, validation and test."),
    "USER_ID_FIELD": Key(COLUMN, "data", "The column of users."),
    "ITEM_ID_FIELD": Key(COLUMN, "data", "The column of items."),
    "RATING_FIELD": Key(COLUMN, "data", "The column of ratings."),
    "TIME_FIELD": Key(COLUMN, "data", "The column of times."),
    "LABEL_FIELD": Key(COLUMN, "data", "The column of labels, as threshold makes it."),
    "NEG_PREFIX": Key(Text("a prefix"), "data", "What the names of negative samples begin with."),
    "LIST_SUFFIX": Key(Text("a suffix"), "data", "What the names of histories end with."),
    "ITEM_LIST_LENGTH_FIELD": Key(COLUMN, "data", "The name of the histories' lengths."),
    "POSITION_FIELD": Key(COLUMN, "data", "The name of the positions in a history."),
    "HEAD_ENTITY_ID_FIELD": Key(COLUMN, "data", "The column of heads of a knowledge graph."),
    "TAIL_ENTITY_ID_FIELD": Key(COLUMN, "data", "The column of its tails."),
    "RELATION_ID_FIELD": Key(COLUMN, "data", "The column of its relations."),
    "ENTITY_ID_FIELD": Key(COLUMN, "data", "The column of its entities."),
    "kg_reverse_r": Key(FLAG, "data", "Whether the edges of a knowledge graph go both ways."),
    "entity_kg_num_interval": Key(Filter(), "data", "How many triples an entity must have to stay.", empty=True),
    "relation_kg_num_interval": Key(Filter(), "data", "How many triples a relation must have to stay.", empty=True),

    # what the model computes; the sentences stand in properties/model
    "hidden_size": Key(AT_LEAST_1, "model", tune=(32, 64, 128, 256), named=True),
    "embedding_size": Key(AT_LEAST_1, "model", tune=(32, 64, 128, 256)),
    "inner_size": Key(AT_LEAST_1, "model", tune=(128, 256, 512)),
    "num_layers": Key(LAYERS, "model", tune=(1, 2, 3, 4, 6, 8), named=True),
    "n_layers": Key(LAYERS, "model", tune=(1, 2, 3, 4, 6, 8), named=True),
    "residual": Key(Choice("auto", True, False), "model", named=True),
    "n_heads": Key(AT_LEAST_1, "model", tune=(1, 2, 4)),
    "dropout_prob": Key(PART, "model", tune=Span(0.0, 0.6), named=True),
    "hidden_dropout_prob": Key(PART, "model", tune=Span(0.0, 0.6), named=True),
    "attn_dropout_prob": Key(PART, "model", tune=Span(0.0, 0.6), named=True),
    "hidden_act": Key(Choice("gelu", "relu", "swish", "tanh", "sigmoid"), "model"),
    "initializer_range": Key(NOT_NEGATIVE, "model"),
    "layer_norm_eps": Key(POSITIVE, "model"),
    "norm_position": Key(Choice("post", "pre"), "model", tune=("post", "pre"), named=True),
    "feed_forward": Key(Choice("mlp", "swiglu"), "model", tune=("mlp", "swiglu"), named=True),
    "gated_residual": Key(FLAG, "model", tune=(False, True), named=True),
    "score": Key(Choice("dot", "cosine"), "model", tune=("dot", "cosine"), named=True),
    "temperature": Key(POSITIVE, "model", tune=(0.05, 0.07, 0.1, 1.0), named=True),
    "label_smoothing": Key(PART, "model", tune=(0.0, 0.05, 0.1, 0.2), named=True),
    "logq_correction": Key(FLAG, "model", tune=(True, False), named=True),
    "loss_type": Key(Choice("CE", "BPR"), "model", named=True),
    "num_negatives": Key(AT_LEAST_1, "model", tune=(64, 128, 256, 512)),
    "negative_power": Key(NOT_NEGATIVE, "model", tune=Span(0.0, 1.0)),
    "gbce_t": Key(Number("[0, 1]"), "model", tune=Span(0.0, 1.0)),
    "d_state": Key(AT_LEAST_1, "model", tune=(8, 16, 32, 64)),
    "d_conv": Key(AT_LEAST_1, "model"),
    "expand": Key(AT_LEAST_1, "model", tune=(1, 2)),
    "head_dim": Key(AT_LEAST_1, "model"),
    "n_groups": Key(AT_LEAST_1, "model"),
    "dt_init": Key(Choice("log_uniform", "zero_bias"), "model"),
    "readout": Key(Choice("last", "mean"), "model"),
    "time": Key(Choice("none", "gaps", "query"), "model", empty=True, named=True),
    "query_calendar": Key(FLAG, "model", empty=True),
    "query_enters": Key(Choice("input", "output"), "model", empty=True),
    "gap_enters": Key(Choice("input", "step"), "model", empty=True, named=True),
    "base_model": Key(_BASE, "model", effect="free"),
    "base_model_dtype": Key(Choice("auto", "float32", "bfloat16"), "model"),
    "base_model_download": Key(FLAG, "model", effect="none"),
    "lora_r": Key(whole_number("[0, inf)"), "model", tune=(4, 8, 16), empty=True),
    "lora_modules": Key(Either(Choice("all-linear"), Many(Text("the name of a layer"), least=1)), "model", empty=True),
    "title_field": Key(COLUMN, "model", empty=True),
    "random_base_args": Key(Fields({}, "{'hidden_size': 128}", open=True), "model", empty=True),
    "bm25_k1": Key(Many(NOT_NEGATIVE, or_one=True, least=1), "model"),
    "bm25_b": Key(Many(Number("[0, 1]"), or_one=True, least=1), "model"),
    "prompt_history": Key(AT_LEAST_1, "model", tune=(5, 10, 20)),
    "prompt_batch_tokens": Key(AT_LEAST_1, "model", effect="none"),
    "rerank": Key(Choice("all", "retrieved"), "model", effect="free"),
    "retriever": Key(Text("a name such as 2Mamba4Rec"), "model"),
    "retriever_config": Key(Fields({}, "{'epochs': 20}", open=True), "model", empty=True),
    "retriever_checkpoint": Key(_CHECKPOINT, "model", effect="none", empty=True),
}
# fmt: on

OF_RANKS = ("hit", "recall", "precision", "mrr", "map", "ndcg", "gauc")
"""Metrics of where the target stands, of which more is better."""
MASKED = "masked "
"""Before the name of a metric: in lists without the items of the user's history."""

FREE_KEYS = {name for name, key in KEYS.items() if key.free}
"""What a resumed run may change without being another run."""
MACHINE_KEYS = {name for name, key in KEYS.items() if key.scope == "machine"}
"""Of the machine, not of the model; checkpoints do not keep them."""


def row(name: str) -> Key | None:
    """The row of a name, of which there are many for ``alias_of_...``; None where there is none."""
    return KEYS.get("alias_of_item_id" if name.startswith("alias_of_") else name)
