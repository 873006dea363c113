"""The command line: ``run_recbole_ssm.py``, ``recbole-ssm`` and ``python -m recbole_ssm`` all come here."""

from __future__ import annotations

import sys
from collections.abc import Callable

from recbole_ssm import __version__, console
from recbole_ssm.arguments import join_values, literal
from recbole_ssm.errors import NO_RECBOLE, UserError, did_you_mean
from recbole_ssm.memory import restart_with_allocator_settings

USAGE = f"""recbole_ssm {__version__}: sequential recommendation with state-space models, on RecBole

  recbole-ssm train     train and test a model: train [--model=2Mamba4Rec] [--dataset=ml-100k] [--key=value ...]
                        python run_recbole_ssm.py [--key=value ...] is the same, and so is recbole-ssm --key=value ...

      --model           Mamba4Rec, 2Mamba4Rec, Hydra4Rec, LlamaRec, GPT4Rec, Pop, RepeatNewest, any sequential model of
                        RecBole's (SASRec, BERT4Rec ...), or a class of your own: --model=my_package.my_file:MyModel
      --dataset         toy and ml-100k (they come along), ml-1m, amazon-beauty, amazon-video-games,
                        amazon-beauty-personal-care-23, amazon-video-games-23, or a folder of atomic files in data_path
      --config_files    YAML files of settings: "a.yaml b.yaml"; a later one wins
      --resume          a checkpoint, the folder of a run, or the folder above: go on from the newest, byte for byte
      --init            start from the weights of a checkpoint or run, on data with new users, events and items
      --key             any key of RecBole's or of properties/, for example --learning_rate=0.003 --data_path=../data

  recbole-ssm recommend the next items of many users, as a file: recommend CHECKPOINT [--users=FILE] [--out=recs.csv];
                        or of one history, on the screen: recommend CHECKPOINT --history=ITEM,ITEM
  recbole-ssm evaluate  a trained model with other metrics, splits or data: evaluate CHECKPOINT [--topk='[10,20]']
  recbole-ssm serve     recommendations over HTTP, from events as they come: serve CHECKPOINT [--state=DIR]
  recbole-ssm state     events into a server's store, or out of it: state CHECKPOINT --state=DIR --import=FILE
  recbole-ssm export    vectors of items or users by raw id: export CHECKPOINT --what=items [--out=items.parquet];
                        or the model itself, to run elsewhere: export CHECKPOINT --what=model [--format=onnx]
  recbole-ssm convert   MovieLens, Amazon Reviews or any table into a checked data set: convert SOURCE --name=NAME
  recbole-ssm inspect   what a data set holds, and what is wrong with it: inspect DATASET [--data_path=DIR] [--k_core=5]
  recbole-ssm keys      every config key with what it accepts; keys KEY says all about one
  recbole-ssm doctor    versions, device, usable kernels, and the line that installs what is missing;
                        --numerics compares every backend with the float64 reference on this machine
  recbole-ssm compare   models by data sets in one table with paired tests: compare --models=SASRec,2Mamba4Rec --seeds=5
  recbole-ssm tune      the best hyper-parameters of a model: tune --model=M [--params_file=FILE.hyper] [--algo=bayes]
  recbole-ssm study     questions that take many runs: study length --help says more
  recbole-ssm bench     measure side by side in one run: bench train [--json=FILE]; bench train --help says more
  recbole-ssm pairs     LlamaRec's training rows as preference pairs, for TRL: pairs OUT.jsonl [--key=value ...]

  every command takes --help, and --quiet: no progress bars, and of a run's log only warnings and the result;
  recbole-ssm --version prints the version
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, by default that of ``sys.argv``, for which a process that trains may begin once more.

    The exit status is 0, 2 for a mistake of the user's, 1 for a failing disk, 130 for Ctrl-C.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        if _trains(arguments):
            restart_with_allocator_settings()
    console.set_quiet("--quiet" in arguments)
    arguments = [argument for argument in arguments if argument != "--quiet"]
    if "--tune" in arguments and arguments[0].startswith("-"):  # of the main job; compare has one too
        arguments = ["tune", *(argument for argument in arguments if argument != "--tune")]
        print("recbole_ssm: --tune is the command recbole-ssm tune", file=sys.stderr)
    try:
        asks_for_help = any(argument in ("-h", "--help", "help") for argument in arguments)
        if not arguments or (asks_for_help and arguments[0] not in WITH_HELP):
            print(USAGE, end="")
        elif arguments == ["--version"]:
            print(f"recbole_ssm {__version__}")
        elif arguments and not arguments[0].startswith("-"):
            name = arguments[0]
            if name not in COMMANDS:
                raise UserError(f"there is no command '{name}'{did_you_mean(name, COMMANDS) or '; see --help'}")
            COMMANDS[name](arguments[1:])
        else:
            train(arguments)
    except UserError as error:
        print(f"recbole_ssm: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "recbole":
            raise
        print(f"recbole_ssm: error: {NO_RECBOLE}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"recbole_ssm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"recbole_ssm: interrupted; {interrupt}".rstrip("; "), file=sys.stderr)
        return getattr(interrupt, "status", 130)
    return 0


def train(arguments: list[str]) -> None:
    """Train and test a model on a data set."""
    options = join_values(arguments)
    files = _take(options, "config_files") or ""
    resume, init = _take(options, "resume"), _take(options, "init")
    allow_pickle = literal(_take(options, "allow_pickle") or "False")
    if not isinstance(allow_pickle, bool):
        raise UserError(f"--allow_pickle: must be True or False, got {allow_pickle}")

    from recbole_ssm.quick_start import run_recbole_ssm

    run_recbole_ssm(
        config_file_list=files.split(),
        command_line=options,
        resume=resume,
        init=init,
        allow_pickle=allow_pickle,
    )


def compare(arguments: list[str]) -> None:
    """The study that the paper's table is."""
    study(["compare", *arguments])


def tune(arguments: list[str]) -> None:
    """Search for the best hyper-parameters."""
    study(["tune", *arguments])


def study(arguments: list[str]) -> None:
    """Train what a question needs over many runs, and print its table."""
    from recbole_ssm.study import main as run_study

    run_study(arguments)


def doctor(arguments: list[str]) -> None:
    """Print what this machine has, and how to install what it lacks; with ``--numerics`` compare the backends on it."""
    if arguments not in ([], ["--numerics"]):
        raise UserError(f"doctor takes no arguments but --numerics, got {' '.join(arguments)}")
    from recbole_ssm.doctor import numerics, report

    if not arguments:
        print(report())
        return
    text, right = numerics()
    print(text)
    if not right:
        raise UserError("a backend is wrong on this machine; choose another with ssm_backend, and report the table")


def bench(arguments: list[str]) -> None:
    """Measure, side by side in one run."""
    from recbole_ssm.bench import main as run_bench

    run_bench(arguments)


def convert(arguments: list[str]) -> None:
    """Write a raw data set as checked atomic files."""
    from recbole_ssm.data.convert import main as run_convert

    run_convert(arguments)


def inspect(arguments: list[str]) -> None:
    """Print what a data set holds, and what is wrong with it."""
    from recbole_ssm.data.summary import main as run_inspect

    run_inspect(arguments)


def recommend(arguments: list[str]) -> None:
    """Write the next items of many users to a file."""
    from recbole_ssm.commands.recommend import main as run_recommend

    run_recommend(arguments)


def evaluate(arguments: list[str]) -> None:
    """Test a trained model again."""
    from recbole_ssm.commands.evaluate import main as run_evaluate

    run_evaluate(arguments)


def export(arguments: list[str]) -> None:
    """Write the vectors of items or users, or the model itself."""
    from recbole_ssm.commands.export import main as run_export

    run_export(arguments)


def serve(arguments: list[str]) -> None:
    """Serve a trained model over HTTP."""
    from recbole_ssm.commands.serve import main as run_serve

    run_serve(arguments)


def state(arguments: list[str]) -> None:
    """Fill the store of a server, or write what it holds."""
    from recbole_ssm.commands.state import main as run_state

    run_state(arguments)


def keys(arguments: list[str]) -> None:
    """Print the config keys, or one of them."""
    from recbole_ssm.reference import print_keys

    print_keys(arguments)


def pairs(arguments: list[str]) -> None:
    """Write LlamaRec's training rows as preference pairs."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("pairs: name the file to write first: pairs OUT.jsonl --dataset=ml-100k [--key=value ...]")
    options = join_values(arguments[1:])
    files = _take(options, "config_files") or ""
    from recbole_ssm.quick_start import export_pairs

    export_pairs(arguments[0], config_file_list=files.split(), command_line=options)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "bench": bench,
    "compare": compare,
    "convert": convert,
    "doctor": doctor,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "keys": keys,
    "pairs": pairs,
    "recommend": recommend,
    "serve": serve,
    "state": state,
    "study": study,
    "train": train,
    "tune": tune,
}
# These answer --help themselves.
WITH_HELP = set(COMMANDS) - {"doctor", "keys", "pairs", "train"}


def _trains(arguments: list[str]) -> bool:
    """Whether a command trains in this process."""
    first = arguments[0] if arguments else "--help"
    return first in ("train", "pairs") or (first.startswith("-") and first not in ("-h", "--help", "--version"))


def _take(options: list[str], key: str) -> str | None:
    """Remove ``--key=value`` from the options and return its value, None if it is not there."""
    values = [option.partition("=")[2] for option in options if option.startswith(f"--{key}=")]
    options[:] = [option for option in options if not option.startswith(f"--{key}=")]
    if len(values) > 1:
        hint = f"; name all files in one: --{key}='{' '.join(values)}'" if key == "config_files" else "; keep one"
        raise UserError(f"--{key} is given twice{hint}")
    return values[0] if values else None
