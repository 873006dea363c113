"""What a run shows on the screen, and what its log file keeps."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import logging
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_ssm.errors import shown

if TYPE_CHECKING:
    from tqdm.auto import tqdm

RESULT = 25
"""The level of a run's closing block: above INFO and below WARNING, so that ``--quiet`` leaves it."""

SCREEN, FILE = "recbole_ssm screen", "recbole_ssm file"
"""The names of the two handlers that :func:`begin_log` gives to the root logger."""

logging.addLevelName(RESULT, "RESULT")
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Let this process show no progress bars, and of a run's log only warnings and the result."""
    global _quiet
    _quiet = quiet


def shows_progress(wanted: bool = True) -> bool:
    """Whether bars are seen: where they are wanted, on a terminal or in a notebook, and not with ``--quiet``."""
    return wanted and not _quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def progress_bar(steps: Iterable[Any] | None = None, wanted: bool = True, **options: Any) -> tqdm[Any]:
    """A progress bar of tqdm's, which draws nothing where :func:`shows_progress` says no.

    Args:
        steps: what it goes through.
        wanted: whether the user asked for bars.
        **options: of tqdm.
    """
    # The command line starts faster without it, and doctor works where it is missing.
    from tqdm.auto import tqdm

    return tqdm(steps, disable=not shows_progress(wanted), **options)


def begin_log(config: Any) -> Path | None:
    """Log on the screen, and in a file of this run: ``log/<model>/<model>-<dataset>-<time>-<digest>.log``, as RecBole.

    The screen shows what the key ``state`` asks for. The file keeps all settings and the model's modules too, unless
    ``state`` asks for warnings or errors alone. Where the program has set up logging by itself, nothing is changed.

    Args:
        config: the configuration of the run, whose ``final_config_dict`` gives the digest.

    Returns:
        The file, or None where there is none.
    """
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if handler.get_name() in (SCREEN, FILE)]
    if len(ours) < len(root.handlers):
        return None
    for handler in ours:
        root.removeHandler(handler)
        handler.close()

    level = getattr(logging, str(config["state"]).upper(), logging.INFO)
    screen = _Screen()
    screen.setLevel(max(level, RESULT) if _quiet else level)
    screen.setFormatter(_Lines())
    model, now = config["model"], datetime.datetime.now().strftime("%b-%d-%Y_%H-%M-%S")
    settings = "".join(map(str, config.final_config_dict.values()))
    digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
    path = Path("log", model, f"{model}-{config['dataset']}-{now}-{digest}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setLevel(logging.DEBUG if level <= logging.INFO else level)
    file.addFilter(_is_of_the_run)
    file.setFormatter(_Plain("%(asctime)s %(levelname)s  %(message)s", "%a %d %b %Y %H:%M:%S"))
    for handler, name in ((screen, SCREEN), (file, FILE)):
        handler.set_name(name)
        root.addHandler(handler)
    root.setLevel(min(screen.level, file.level))
    return path


def opening(config: Any, log: Path | None) -> str:
    """One line: what is trained, what differs from the defaults, and where the log is."""
    changed = ", ".join(f"{key}: {shown(value)}" for key, value in config.changed.items())
    where = f"; log: {log}" if log else ""
    return f"{config['model']} on {config['dataset']}; {changed or 'all settings are defaults'}{where}"


def closing(config: Any, result: Mapping[str, Any]) -> str:
    """The metrics of the test, where the run lies, and the commands that come next, ready to be pasted.

    Args:
        config: the configuration of the run.
        result: what :func:`recbole_ssm.run_recbole_ssm` returns.
    """
    tested, own_class = result["test_result"], config.class_path
    lines = [tested.table("test result") if tested else "test result: there is none"]
    commands = []
    if result["checkpoint"]:
        folder = Path(result["checkpoint"]).parent
        lines += ["", f"run   {folder}"]
        trained = run_on_command_line(config, folder)
        cutoffs = ",".join(map(str, sorted({*config["topk"], 20})))
        commands = [
            f"recommend {trained} --k=10 --exclude_seen --out=recommendations.csv",
            f"evaluate {trained} --topk='[{cutoffs}]'",
        ]
    models = [own_class or config["model"], "2Mamba4Rec" if config["model"] == "SASRec" else "SASRec"]
    data_path = config.changed.get("data_path")
    where = f" --data_path={shlex.quote(str(data_path))}" if data_path else ""
    if base_model := config.changed.get("base_model"):
        where += f" --{config['model']}.base_model={shlex.quote(str(base_model))}"
    models_and_data = f"--models={shlex.quote(','.join(models))} --datasets={shlex.quote(config['dataset'])}"
    commands.append(f"compare {models_and_data}{where} --seeds=3")
    for heading, command in itertools.zip_longest(["next"], commands, fillvalue=""):
        lines.append(f"{heading:6}recbole-ssm {command}")
    return "\n".join(lines)


def trained_in_words(loss: float, seconds: float, events: int) -> str:
    """What an epoch's training gave and cost; a run that goes on behind its last batch has no speed."""
    return f"loss {loss:.4f}" + (f", {seconds:.1f} s, {events / seconds:,.0f} events/s" if events else "")


def run_on_command_line(config: Any, folder: Path | None) -> str:
    """How a command names a run: its folder, and the class of a model of one's own."""
    own_class = config.class_path
    return shlex.quote(str(folder)) + (f" --model={shlex.quote(own_class)}" if own_class else "")


class _Screen(logging.StreamHandler[Any]):
    """Writes results to standard output and all else to standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        from tqdm.auto import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stdout if record.levelno == RESULT else sys.stderr)
        except Exception:
            self.handleError(record)


class _Plain(logging.Formatter):
    """Without the colours that RecBole puts into what it says."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return re.sub(r"\x1b\[[0-9;]*m", "", super().format(record))


class _Lines(_Plain):
    """The time before each record that is no result, and the level before a warning; its lines make one column."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        text = super().format(record)
        if record.levelno == RESULT:
            return f"\n{text}"
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        time = self.formatTime(record, "%H:%M:%S  ")
        return f"{time}{level}{text}".replace("\n", "\n" + " " * len(time))


def _is_of_the_run(record: logging.LogRecord) -> bool:
    """Whether the log file keeps a record: all but what other libraries say to their own developers."""
    return record.levelno >= logging.INFO or record.name.partition(".")[0] in ("root", "recbole_ssm")
