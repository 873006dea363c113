"""Does a language model order a retriever's candidates better than the retriever, and what of size, ORPO, verbalizer?

One LlamaRec for each base model, verbalizer and objective, all of as many steps, over the same retriever. The order of
its candidates by the language model, and fused with the retriever's by a weight that is chosen on validation, is
paired with the retriever's own over the users of the test. Bases are separated by commas: folders, GGUF files, hub
names, `random`, or `random:64x2` for a random Llama of width 64 and 2 layers. On a GPU the same command takes larger
ones; on a CPU --eval_rows and --train_last say how much is enough. Each run trains its own retriever, by its own seed,
unless --retriever_checkpoint names one that is trained.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from typing import Any

import numpy as np

from recbole_ssm.arguments import at_least, each_once, some_of
from recbole_ssm.evaluation.significance import K, Pair, corrected, over_users, paired
from recbole_ssm.files import write_csv, write_text
from recbole_ssm.llm.preference import OBJECTIVES
from recbole_ssm.llm.reranking import FUSED, LANGUAGE_MODEL, RETRIEVER, report
from recbole_ssm.llm.verbalizer import VERBALIZERS
from recbole_ssm.study.cells import grid
from recbole_ssm.study.compare import FIRST_SEED, check_rows, fetch, seeds_from
from recbole_ssm.study.outcome import Outcome, Run
from recbole_ssm.study.runs import runs_in

BASES = "random:32x1,random:64x2,random:128x4"
ORDERS = (RETRIEVER, LANGUAGE_MODEL, FUSED)
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this study."""
    add = parser.add_argument
    add("--base_models", type=each_once, default=BASES, help=f"separated by commas; default {BASES}")
    known = some_of(VERBALIZERS)
    add("--verbalizers", type=known, default="letters", help=f"of {', '.join(VERBALIZERS)}; default letters")
    add("--objectives", type=some_of(OBJECTIVES), default="sft,orpo", help="of sft, orpo; default both")
    add("--dataset", default="ml-100k", help="default ml-100k, which comes along")
    add("--seeds", type=at_least(1), default=1, help=f"runs of each, from --seed={FIRST_SEED} on; default 1")


def run(options: argparse.Namespace, keys: dict[str, Any]) -> str:
    """Train what is missing, and write the table to the folder."""
    # Users without their target among the candidates are left out of the work, not of the metrics.
    plain = {"rerank": "retrieved", "fusion_weight": "tuned", **keys}
    seeds = seeds_from(plain, options.seeds)
    runs, common = runs_in(options.folder, plain)
    arms = list(itertools.product(options.base_models, options.verbalizers, options.objectives))
    todo = [Run("LlamaRec", options.dataset, {**_options_of(*arm), **common, "seed": s}) for arm in arms for s in seeds]
    # Mistakes come before the first training.
    check_rows(runs, todo, tune=plain["fusion_weight"] == "tuned")
    fetch(runs, todo)
    outcomes = list(runs.all(todo))
    grouped = [outcomes[n : n + options.seeds] for n in range(0, len(outcomes), options.seeds)]
    rows = table(dict(zip(arms, grouped)))
    failed = [f"- {one.run}: {one.error}" for one in outcomes if one.error is not None]
    text = markdown(rows) + "\n".join([_protocol(outcomes, seeds), *failed]) + "\n"
    write_text(options.folder / "llm.md", text)
    write_csv(options.folder / "llm.csv", rows)
    return f"{text}\nwritten to {options.folder}/: llm.md, llm.csv"


def table(arms: dict[tuple[str, str, str], list[Outcome]]) -> list[Row]:
    """A row for each arm and order: NDCG@10 and Hit@10, overall and among the retrieved, and against the retriever.

    ``difference`` is that of NDCG@10 over all users, ``low`` and ``high`` its 95% interval, ``p`` that of the paired
    t-test with Holm's correction over all rows of the table that are no retriever's.
    """
    rows: list[Row] = []
    tested: list[Row] = []
    pairs: list[Pair] = []
    for (base, verbalizer, objective), outcomes in arms.items():
        done = [outcome for outcome in outcomes if outcome.error is None]
        values = {order: over_users("NDCG@10", [outcome.ranks(order) for outcome in done]) for order in ORDERS}
        reports = [report({order: outcome.ranks(order)[1] for order in ORDERS}, [K]) for outcome in done]
        measured = [outcome.reranking or {} for outcome in done]
        for order in ORDERS if done else ():
            row: Row = {"base": base, "verbalizer": verbalizer, "objective": objective, "order": order}
            for part in ("overall", "retrieved"):
                for name in ("ndcg@10", "hit@10"):
                    row[f"{part} {name}"] = float(np.mean([found[part][order][name] for found in reports]))
            row |= {"difference": None, "low": None, "high": None, "p": None}
            if order != RETRIEVER:
                pair = paired("NDCG@10", (order, values[order]), (RETRIEVER, values[RETRIEVER]))
                row |= {"difference": pair.difference, "low": pair.low, "high": pair.high}
                tested.append(row)
                pairs.append(pair)
            row["fusion_weight"] = float(np.mean([found["fusion_weight"] for found in measured]))
            row["seconds_per_user"] = float(np.mean([found["seconds_per_user"] or 0.0 for found in measured]))
            row["parameters"], row["seconds"] = done[0].parameters, float(np.mean([o.seconds for o in done]))
            row["users"], row["retrieved_users"] = reports[0]["users"], reports[0]["retrieved_users"]
            rows.append(row)
    for row, pair in zip(tested, corrected(pairs)):
        row["p"] = pair.holm_p
    return rows


def markdown(rows: list[Row]) -> str:
    """The table in Markdown; a retriever that several arms share stands there once."""
    titles = ["base", "parameters", "verbalizer", "objective", "order", "NDCG@10", "Hit@10", "NDCG@10 retrieved"]
    titles += ["against the retriever", "p (Holm)", "weight", "s a user"]
    lines = []
    seen: set[tuple[float, ...]] = set()
    for row in rows:
        figures = [row["overall ndcg@10"], row["overall hit@10"], row["retrieved ndcg@10"]]
        who = [row["base"], f"{row['parameters']:,}", row["verbalizer"], row["objective"]]
        if row["order"] == RETRIEVER:
            if tuple(figures) in seen:
                continue
            seen.add(tuple(figures))
            who = [""] * 4
        cells = [*who, row["order"], *(f"{figure:.4f}" for figure in figures)]
        if row["order"] == RETRIEVER:
            cells += [""] * 4
        else:
            # Fewer than two users say nothing.
            said = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})", f"{row['p']:.3f}"
            cells += ["", ""] if math.isnan(row["p"]) else said
            cells += [f"{row['fusion_weight']:.2f}" if row["order"] == FUSED else "", f"{row['seconds_per_user']:.3f}"]
        lines.append(cells)
    return grid(titles, lines)


def _options_of(base: str, verbalizer: str, objective: str) -> dict[str, Any]:
    options: dict[str, Any] = {"base_model": base, "verbalizer": verbalizer, "train_objective": objective}
    if sizes := re.fullmatch(r"random:(\d+)x(\d+)", base):
        width, layers = map(int, sizes.groups())
        options["base_model"] = "random"
        options["random_base_args"] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 16),
        }
    if verbalizer == "embedding":
        options["orpo_probabilities"] = "letters"
    return options


def _protocol(outcomes: list[Outcome], seeds: list[int]) -> str:
    done = [outcome for outcome in outcomes if outcome.error is None]
    if not done or done[0].reranking is None:
        return ""
    first, found = done[0], done[0].reranking
    steps = sorted({outcome.history[-1]["steps"] for outcome in done if outcome.history})
    others = {k: v for k, v in first.run.options.items() if k not in ("seed", "base_model", "random_base_args",
              "verbalizer", "train_objective", "orpo_probabilities")}  # fmt: skip
    return (
        f"\n{first.run.dataset}: {found['users']:,} users tested, the target of {found['retrieved_users']:,} among the "
        f"candidates (the rest are misses for every order); {' or '.join(f'{s:,.0f}' for s in steps)} steps each; "
        f"seeds {seeds[0]} to {seeds[-1]}; {', '.join(f'{k} {v}' for k, v in others.items())}. "
        "The weight is the retriever's share, chosen on validation. p: two-sided paired t-test of NDCG@10 over users, "
        "Holm-corrected over the rows. s a user: language model and retriever, a user whose candidates were ordered, "
        "on a machine with other work."
    )
