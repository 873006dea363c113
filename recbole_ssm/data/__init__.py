"""RecBole's atomic files in, RecBole's data sets out."""

from recbole_ssm.data.dataset import SSMDataset, create_dataset

__all__ = ["SSMDataset", "create_dataset"]
