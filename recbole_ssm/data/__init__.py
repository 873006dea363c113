"""RecBole's atomic files in, RecBole's data sets out; raw downloads in, atomic files out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_ssm.data.dataset import SequentialDataset, create_dataset

__all__ = ["SequentialDataset", "create_dataset"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, because convert and inspect need neither RecBole nor PyTorch.
    if name in (*__all__, "SSMDataset"):
        from recbole_ssm.data import dataset

        # SSMDataset was its name in 0.1.0.
        return getattr(dataset, name.replace("SSM", "Sequential"))
    raise AttributeError(f"module 'recbole_ssm.data' has no attribute '{name}'")
