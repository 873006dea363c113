"""Other names of the config keys: those of earlier versions, which still count, and words of others, for a hint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from recbole_ssm.errors import UserError, did_you_mean

ALIASES = {"learner_average": "average_power"}
"""The names that keys had in earlier versions; what is given by one of them still counts."""
OTHER_WORDS = {
    "lr": ["learning_rate"],
    "wd": ["weight_decay"],
    "optimizer": ["learner"],
    "optim": ["learner"],
    "scheduler": ["lr_scheduler"],
    "warmup": ["lr_warmup"],
    "warmup_steps": ["lr_warmup"],
    "batch_size": ["train_batch_size"],
    "batch": ["train_batch_size"],
    "bs": ["train_batch_size"],
    "num_epochs": ["epochs"],
    "n_epochs": ["epochs"],
    "max_epochs": ["epochs"],
    "patience": ["stopping_step"],
    "grad_clip": ["clip_grad_norm"],
    "max_grad_norm": ["clip_grad_norm"],
    "loss": ["loss_type"],
    "max_len": ["MAX_ITEM_LIST_LENGTH"],
    "maxlen": ["MAX_ITEM_LIST_LENGTH"],
    "max_length": ["MAX_ITEM_LIST_LENGTH"],
    "max_seq_len": ["MAX_ITEM_LIST_LENGTH"],
    "max_seq_length": ["MAX_ITEM_LIST_LENGTH"],
    "dim": ["hidden_size", "embedding_size"],
    "d_model": ["hidden_size", "embedding_size"],
    "hidden_dim": ["hidden_size", "embedding_size"],
    "embedding_dim": ["hidden_size", "embedding_size"],
    "emb_dim": ["hidden_size", "embedding_size"],
    "layers": ["num_layers", "n_layers"],
    "num_blocks": ["num_layers", "n_layers"],
    "dropout": ["dropout_prob", "hidden_dropout_prob"],
    "k": ["topk"],
    "top_k": ["topk"],
    "metric": ["metrics"],
    "random_seed": ["seed"],
    "gpu": ["gpu_id"],
    "num_workers": ["worker"],
    "split": ["eval_args"],
}
"""What others call these keys, for the hint in an error; the first name that the model has is meant."""


def nearest(name: str, known: Collection[str], other_words: bool) -> str:
    """Which known key a wrong name may mean, as :func:`recbole_ssm.errors.did_you_mean` says it.

    ``other_words`` takes what others call a key too; a user's own model may read a key by such a name.
    """
    meant = next((key for key in OTHER_WORDS.get(name, ()) if other_words and key in known), None)
    return f"; did you mean '{meant}'?" if meant else did_you_mean(name, known)


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that keys have now; the retriever's options within them too.

    Raises:
        UserError: a key is there by its old name and by its new one.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        new = ALIASES.get(name, name)
        if new in found or (new != name and new in options):
            raise UserError(f"{name}: its name is {new} now, and both are given; keep {new}")
        if name in ("retriever_config", "retriever_settings") and isinstance(value, Mapping):
            value = renamed(value)
        found[new] = value
    return found
