"""Sequential recommendation with state-space models, as a plugin for RecBole.

``run_recbole_ssm`` trains and tests a model, ``load_recommender`` serves one. :mod:`recbole_ssm.ops` and
:mod:`recbole_ssm.layers` need no RecBole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_ssm.quick_start import load_recommender, run_recbole_ssm

__version__ = "0.3.0"

__all__ = ["__version__", "load_recommender", "run_recbole_ssm"]


def __getattr__(name: str) -> Any:
    # RecBole is imported when it is first needed, so that ops and layers can be used without it
    if name in ("load_recommender", "run_recbole_ssm"):
        from recbole_ssm import quick_start

        return getattr(quick_start, name)
    raise AttributeError(f"module 'recbole_ssm' has no attribute '{name}'")
