"""Which kept run a run is: what decides a result, in the words of this version and of those whose runs are kept.

A run is kept under a digest of its content: its resolved settings, the files that it reads, and :func:`results_of`.
Versions differ in the keys that they know and in how they call them, so that one run has other contents in their words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recbole_ssm.errors import UserError
from recbole_ssm.files import digest_of_json
from recbole_ssm.synonyms import ALIASES, renamed

READS_USERS = ("Caser", "DIEN", "DIN", "FOSSIL", "FPMC", "HGN", "HRM", "NPE", "SHAN", "TransRec")
"""RecBole's models whose scores depend on the user besides the history."""
SCANS = ("Mamba4Rec", "2Mamba4Rec", "Hydra4Rec")
"""Models of state-space layers."""
WITHOUT_ORDER = ("Pop", "RepeatNewest")
"""Models that give many items the same score."""


def results_of(settings: Mapping[str, Any]) -> str:
    """The version since which runs with these resolved settings give today's results.

    What an earlier version left of such a run is trained again; what this version or a later one left is read. Whoever
    changes the results of some settings adds a condition for exactly these above the others, which returns the version
    to come, and a line to CHANGELOG.md.
    """
    retriever = settings.get("retriever"), settings.get("retriever_config") or {}
    stages = ((settings["model"], settings), retriever)
    for model, options in stages:
        # Where no kernel of ours computes them, the scans took their products in half precision.
        if options.get("enable_amp") and model in SCANS:
            return "0.3.0"
        mode = options.get("train_mode")
        # Where the oldest events of a history are no targets, packed training left out all but a few of them.
        context = options.get("packed_context") or math.inf
        short = model == "SASRec" or context < options.get("MAX_ITEM_LIST_LENGTH", 0)
        few = mode == "masked" or (short and mode in (None, "packed"))
        if few and (options.get("train_last") or options.get("train_rows")):
            return "0.3.0"
    # What stood deeper in the histories of the rows that train was cold, and what the rows left out was not.
    if settings.get("drop_cold_targets") and any(settings.get(f"train_{cut}") for cut in ("last", "newest", "rows")):
        return "0.3.0"
    if settings["model"] == "LlamaRec":
        options = settings.get("retriever_config") or {}
        by_row = options.get("time") not in (None, "none") or settings["retriever"] in READS_USERS
        # Rows of equal histories got each other's answers, and where no epoch was validated nothing was tuned.
        if settings.get("fusion_weight") == "tuned" and (by_row or not settings["epochs"]):
            return "0.3.0"
        # Equal scores of the retriever hid the language model's order.
        if settings["retriever"] in WITHOUT_ORDER:
            return "0.3.0"
    grid = [settings.get(key) for key in ("bm25_k1", "bm25_b")]
    several = any(isinstance(values, (list, tuple)) and len(values) > 1 for values in grid)
    if settings["model"] == "GPT4Rec" and several and not settings["epochs"]:
        return "0.3.0"
    # A batch size grows by one sample a process where its factor was too small to move it.
    growth = (settings.get("adaptive_batch_args") or {}).get("growth", 2)
    if settings.get("adaptive_batch") and isinstance(growth, (int, float)) and growth < 2:
        return "0.3.0"
    # Norms of gradients and steps of 16 bits were taken in 16 bits; on a GPU also with base_model_dtype: auto, which
    # settings alone do not tell.
    measured = settings.get("adaptive_batch") or settings.get("learner") in ("usgm", "usfgm")
    rank = settings.get("lora_r")
    whole = rank == 0 or (rank is None and settings.get("base_model") == "random")
    if measured and whole and settings.get("base_model_dtype") == "bfloat16":
        return "0.3.0"
    # Candidates are drawn in another way, and ranked in a list for each target.
    if any(mode.startswith(("uni", "pop")) for mode in settings["eval_args"]["mode"].values()):
        return "0.2.0"
    # The moment of the split was rounded to float32.
    if "TS" in settings["eval_args"]["split"] and not settings["legacy_time_order"]:
        return "0.2.0"
    # The rows of all files were mixed by a sort by time.
    if settings.get("benchmark_filename") is not None:
        return "0.2.0"
    for model, options in stages:
        # It reads the oldest event of a history.
        if model == "BERT4Rec":
            return "0.2.0"
        # Each group of heads is normalised by itself.
        if model == "2Mamba4Rec" and (options.get("n_groups") or 1) > 1 and not options.get("joint_norm"):
            return "0.2.0"
    return "0.1.0"


def reads(config: Any, name: str) -> bool:
    """Whether a run may read the file of a name; of its data set only the atomic files that its keys ask for."""
    part = name.removeprefix(f"{config['dataset']}.")
    if part == name:
        # It is no file of the data set.
        return True
    if config.class_path is not None:
        # The user's own code may read any but what convert says of its work.
        return part != "card.json" and not part.endswith("skipped")
    if part in ("user", "item"):
        load = config["load_col"]
        # Language models read titles whatever is loaded.
        return load is None or part in load or getattr(config.model_class, "reads_text", False)
    more = config["additional_feat_suffix"] or []
    events = [f"{one}.inter" for one in config["benchmark_filename"] or ()] or ["inter"]
    return part in events or part in ([more] if isinstance(more, str) else more)


class Record(NamedTuple):
    """What the ``run.json`` of a kept run says of it; it never changes."""

    content: dict[str, Any]
    """``version`` (:func:`results_of`), ``settings``, and the digests of the ``files``."""
    known: list[str]
    """The names of all keys of the version that wrote it, also of those that were empty and stand in no settings."""

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record of a file; None where it cannot be read, is damaged, or is not there."""
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
            content = job["content"]
            content = {**content, "files": dict(content["files"])}
            # Up to 0.2.0 nobody wrote down what was known; what the settings say was, and what the run's options name.
            known = job.get("known") or job.get("options", ())
            return cls(content, [*known, *renamed(content["settings"])])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            return None


class Identity(NamedTuple):
    """What a run is to this version."""

    content: dict[str, Any]
    """As :class:`Record` has it; settings that are empty by default are left out."""
    known: set[str]
    """The names of all keys of this version that decide results, also of the empty ones."""
    chosen: set[str]
    """The keys whose value is not the model's default, because options, the preset or the data set give another."""
    reads: Callable[[str], bool]
    """Whether the run may read the file of a name."""

    def as_said_by(self, former: Record) -> dict[str, Any] | None:
        """The content in the words of the version that wrote a record, with the keys that it knew.

        None where that version cannot have trained this run, because a key that it did not know is not at its default.
        """
        then = former.content["settings"]
        values, names = renamed(then), {ALIASES.get(name, name): name for name in (*former.known, *then)}
        new = self.content["settings"].keys() - names.keys()
        if not new.isdisjoint(self.chosen):
            return None
        settings = {}
        for key, value in self.content["settings"].items():
            if key in values and values[key] == value:
                # What was renamed within the value too stays as it was.
                settings[names[key]] = then[names[key]]
            elif key not in new and value is not None:
                settings[names.get(key, key)] = value
        # Up to 0.2.0 all files of the data set were digested.
        files = former.content["files"]
        # Up to 0.2.0 of a base model its weights and JSON files.
        now = {
            name: digest
            for name, digest in self.content["files"].items()
            if name in files or not name.startswith("base_model/") or name.endswith((".safetensors", ".json"))
        }
        same = {name: digest for name, digest in files.items() if self.reads(name)} == now
        return {**self.content, "settings": settings, "files": files if same else self.content["files"]}


def existing(stem: Path, digits: int, contents: Iterable[Any]) -> Path:
    """The first folder that is there among those named by the stem and the digests of contents; else the first."""
    first = None
    for content in contents:
        folder = stem.with_name(f"{stem.name}{digest_of_json(content)[:digits]}")
        if folder.is_dir():
            return folder
        first = first or folder
    assert first is not None
    return first
