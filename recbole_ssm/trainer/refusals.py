"""The errors by which RecBole, its models and PyTorch refuse settings or data, as one line for the user."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

from recbole_ssm.errors import UserError, first_line
from recbole_ssm.optim.gradient_noise import is_out_of_memory


@contextlib.contextmanager
def recbole_refusals(what: str) -> Iterator[None]:
    """Turn the errors by which RecBole, its models and PyTorch's optimisers refuse a setting
    into one line.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what}: the data has no field {error}; load it by load_col, or ask for another") from error
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"{what}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what}: more memory is asked for than there is; take smaller sizes ({error})") from error


@contextlib.contextmanager
def refusals_of_a_run(what: str) -> Iterator[None]:
    """Turn into one line what RecBole's models raise of settings or data that they do not take, and a full memory.

    Some of them even end the process, with the status of success. What our own code raises is a defect and stays.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
        houses = [name for file in files for name in ("recbole", "recbole_ssm") if name in file.parts[:-1]]
        if is_out_of_memory(error):
            raise UserError(f"{what}: more memory is asked for than there is; take smaller sizes ({error})") from error
        if not houses or houses[-1] != "recbole":
            raise
        getLogger().debug("what RecBole raised", exc_info=True)
        raise UserError(f"{what}: RecBole's code does not take these settings or data ({first_line(error)})") from error
