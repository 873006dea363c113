"""Base models: any causal language model of transformers, from a folder, a GGUF file, the hub's cache, or at random.

Nothing that is loaded executes code: weights are safetensors or GGUF, never pickles, and a
model's own Python is refused. Nothing is fetched unless ``base_model_download`` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_ssm.errors import UserError, did_you_mean, require
from recbole_ssm.files import digest
from recbole_ssm.llm.prompt import LETTERS

RANDOM = "random"
RANDOM_SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
SIZES = {
    *RANDOM_SIZES,
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
}
"""What ``random_base_args`` may say; other names of LlamaConfig's can let transformers fetch code."""
END, PAD = "<|end|>", "<|pad|>"
"""Tokens 0 and 1 of a random base model."""
SMALLEST_VOCABULARY = 400
"""Room for all bytes, both tokens above, the letters with a space, and the merges that may come
before those.
"""
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
"""What decides what a base model answers: weights, settings and tokenizer."""
UNLIMITED = 2**31
"""A length of texts from here on stands for none: transformers writes 1e30 where a tokenizer names none."""
SECOND_COPY = "consolidated*.safetensors"
"""The same weights once more, in the form of the publisher's own program."""


class BaseModel(NamedTuple):
    """A causal language model with its tokenizer."""

    model: Any
    """transformers' PreTrainedModel, or peft's PeftModel around it; in evaluation mode, on the
    config's device.
    """
    tokenizer: Any
    """A fast tokenizer; its padding token is set."""
    context: int
    """How many tokens the model can read; from :data:`UNLIMITED` up where no limit is named."""
    name: str
    """How the user named it."""
    digest: str
    """SHA-256 of what a checkpoint of trained weights lacks: the tokenizer and, where frozen,
    the base's weights.
    """


def load_base_model(config: Any, texts: Sequence[str]) -> BaseModel:
    """The base model of a configuration, with LoRA where it asks for that.

    Args:
        config: a configuration whose values are checked.
        texts: what the tokenizer of a random base is trained on: the titles, and the prompt's
            own words.

    Raises:
        UserError: no such model, no causal language model, weights missing or pickled, a
            package missing, or a value that does not fit; one line with the mend.
    """
    transformers = require("transformers")
    name, rank = config["base_model"], config["lora_r"]
    if rank is None:
        rank = 0 if name == RANDOM else 8
    dtype = _dtype(config, rank)
    if config["quantize_4bit"] and (not rank or name == RANDOM):
        raise UserError("quantize_4bit: weights of 4 bits stay as they are; name a trained base_model, and lora_r: 8")
    with _quiet(transformers, config["show_progress"]):
        if name == RANDOM:
            sizes = _random_sizes(config)
            tokenizer = random_tokenizer(texts, sizes["vocab_size"])
            model = _random_model(sizes, len(tokenizer), config["seed"]).to(dtype)
            frozen = _digest_of_tensors(model.state_dict())
        else:
            folder, gguf = _locate(name, bool(config["base_model_download"]))
            model, tokenizer = _load(folder, gguf, name, dtype, config)
            files = [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))
            frozen = digest(*files) if rank else ""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A model of text and images has the settings of its text in a configuration of their own.
    settings = model.config.get_text_config()
    # Training reads no cache, and generation asks for its own.
    settings.use_cache = False
    # Chat models bring penalties and temperatures of their own.
    model.generation_config = transformers.GenerationConfig()
    context = int(getattr(settings, "max_position_embeddings", None) or tokenizer.model_max_length)
    if rank:
        model = _with_lora(model, config, rank)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    identity = hashlib.sha256(f"{frozen if rank else ''} {vocabulary}".encode()).hexdigest()
    if not config["quantize_4bit"]:
        model = model.to(config["device"])
    if config["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained, total = size_of(p for p in model.parameters() if p.requires_grad), size_of(model.parameters())
    how = f"LoRA of rank {rank}" if rank else "all weights trained"
    getLogger().info(
        f"base model {name}: {total:,} parameters, {trained:,} trained ({how}), "
        f"{'4-bit nf4' if config['quantize_4bit'] else str(dtype).removeprefix('torch.')}, "
        f"context {context if context < UNLIMITED else 'unlimited'}"
    )
    return BaseModel(model.eval(), tokenizer, context, name, identity)


def size_of(parameters: Iterable[Tensor]) -> int:
    """How many numbers they hold; of those that bitsandbytes keeps in 4 bits there are two in a
    byte.
    """
    return sum(p.numel() * p.element_size() * 2 if type(p).__name__ == "Params4bit" else p.numel() for p in parameters)


def random_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on some texts; any text can be encoded.

    Each capital letter is one token, with a space before it and without.

    Raises:
        UserError: the vocabulary is too small for all bytes and letters.
    """
    if not isinstance(vocab_size, int) or vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"random_base_args: vocab_size must be at least {SMALLEST_VOCABULARY}, got {vocab_size!r}")
    tokenizers, transformers = require("tokenizers"), require("transformers")
    # Otherwise merges could end in these two.
    texts = [text.replace(END, "").replace(PAD, "") for text in texts]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END, PAD],
        show_progress=False,
    )
    # A merge of a pair that stands n times shortens the texts by n symbols, so at most 100
    # merges come before these.
    letters = [f" {letter}" for letter in LETTERS] * (sum(len(text.encode()) for text in texts) // 100 + 1)
    tokenizer.train_from_iterator([*texts, *letters], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def _random_sizes(config: Any) -> dict[str, Any]:
    own = config["random_base_args"] or {}
    for key in own:
        if key not in SIZES:
            hint = did_you_mean(str(key), SIZES) or f"; there are {', '.join(sorted(SIZES))}"
            raise UserError(f"random_base_args: there is no size '{key}'{hint}")
    return {**RANDOM_SIZES, **own}


def _random_model(sizes: dict[str, Any], vocab_size: int, seed: int) -> Any:
    transformers = require("transformers")
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        # A state of its own, so that a base model that stays frozen can be made again from its
        # seed.
        torch.manual_seed(seed)
        try:
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**{**sizes, **ends, "vocab_size": vocab_size})
            )
        except Exception as error:
            # The validation of LlamaConfig raises errors of several classes.
            raise UserError(f"random_base_args: LlamaConfig refuses {sizes} ({_shortly(error)})") from error


def _locate(name: str, download: bool) -> tuple[Path, str | None]:
    """The folder of a base model, and its GGUF file where it is one."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        require("gguf")
        return path.parent, path.name
    if path.is_dir():
        return path, None
    mend = "give a folder with config.json and *.safetensors, a .gguf file, or 'random'"
    if path.exists() or path.suffix.lower() == ".gguf" or path.is_absolute() or name.count("/") > 1:
        raise UserError(f"base_model: {name} is no folder and no GGUF file; {mend}")
    hub = require("huggingface_hub")
    try:
        files = {"allow_patterns": list(HUB_FILES), "ignore_patterns": [SECOND_COPY]}
        return Path(hub.snapshot_download(name, local_files_only=not download, **files)), None
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError, ValueError) as error:
        if download:
            raise UserError(f"base_model: {name} could not be fetched from the hub ({_shortly(error)})") from error
        raise UserError(
            f"base_model: {name} is no folder here and not in the Hugging Face cache; {mend}, or fetch it once with "
            "--base_model_download=True"
        ) from error


def _load(folder: Path, gguf: str | None, name: str, dtype: torch.dtype, config: Any) -> tuple[Any, Any]:
    transformers = require("transformers")
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter too, or its base in the place of the folder's model.
        raise UserError(
            f"base_model: {folder} holds an adapter of peft (adapter_config.json); give a folder of the merged model, "
            "which merge_and_unload() and then save_pretrained() write"
        )
    if gguf is None:
        if not (folder / "config.json").is_file():
            raise UserError(f"base_model: {folder} holds no config.json; give the folder of a model of transformers")
        if not any(folder.glob("*.safetensors")):
            pickled = " (its weights are pickles, whose loading could run code)" if any(folder.glob("*.bin")) else ""
            raise UserError(
                f"base_model: {folder} holds no *.safetensors{pickled}; save it by save_pretrained, which writes them"
            )
        _forbid_kernels(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is not None:
        options["gguf_file"] = gguf
    weights: dict[str, Any] = {**options, "dtype": dtype, "output_loading_info": True}
    if gguf is None:
        weights["use_safetensors"] = True
    if config["quantize_4bit"]:
        if gguf is not None:
            raise UserError("quantize_4bit: a GGUF file is dequantised when it is read; give a folder of safetensors")
        weights |= _four_bits(config, dtype)
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, **options)
        _check_causal(settings, name)
        if gguf is None:
            # transformers chooses them by what is installed, and not by what the file says.
            for choice in ("_attn_implementation", "_experts_implementation"):
                if hasattr(settings, choice):
                    setattr(settings, choice, None)
            weights["config"] = settings
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **weights)
    except UserError:
        raise
    except Exception as error:
        # The errors of transformers, tokenizers and safetensors have no common class.
        raise UserError(f"base_model: transformers cannot load {name} ({_shortly(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"base_model: {name} lacks the weights {missing[0]} ... ({len(missing)} of them)")
    # Where there is no tokenizer, transformers makes an empty one.
    if not tokenizer.is_fast or not tokenizer("A").input_ids:
        raise UserError(f"base_model: {name} has no tokenizer.json; save its fast tokenizer beside it")
    if tokenizer.eos_token is None:
        raise UserError(f"base_model: the tokenizer of {name} has no token that ends a text (eos_token); set one in it")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"base_model: the tokenizer of {name} knows more tokens than the model; they are not a pair")
    if gguf is not None:
        # transformers takes the model for quantised, though it holds plain weights by now.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
    return model, tokenizer


def _forbid_kernels(folder: Path) -> None:
    """Refuse a configuration that names kernels of the hub, which transformers would fetch and import."""

    def check(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in entries:
            if "implementation" in key and "/" in str(value):
                raise UserError(f"base_model: {file} asks for code of the hub by {key}: {value}; delete that entry")
        return dict(entries)

    file = folder / "config.json"
    try:
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=check)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"base_model: {file} cannot be read ({_shortly(error)})") from error


def _check_causal(settings: Any, name: str) -> None:
    known = require("transformers").models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = {n for names in known.values() for n in ([names] if isinstance(names, str) else names)}
    architectures = settings.architectures or [known.get(settings.model_type, settings.model_type)]
    if not names.intersection(architectures):
        raise UserError(
            f"base_model: {name} is {', '.join(map(str, architectures))}, no causal language model; take one such as "
            "Llama, Qwen, SmolLM or GPT-2"
        )


def _four_bits(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """nf4 with double quantisation, as QLoRA (Dettmers et al. 2023) and LlamaRec have it."""
    if torch.device(config["device"]).type != "cuda":
        raise UserError("quantize_4bit: bitsandbytes needs a GPU here; leave it False")
    require("bitsandbytes")
    return {
        "quantization_config": require("transformers").BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": config["device"]},
    }


def _with_lora(model: Any, config: Any, rank: int) -> Any:
    peft = require("peft")
    modules = config["lora_modules"]
    layers = {name.rpartition(".")[2]: type(m).__name__ for name, m in model.named_modules()}
    layers = {name: kind for name, kind in layers.items() if "Linear" in kind or kind == "Conv1D"}
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=modules,
        # The weights of GPT-2's layers are transposed.
        fan_in_fan_out="Conv1D" in layers.values(),
        task_type="CAUSAL_LM",
    )
    head = model.get_output_embeddings()
    inner = {name.rpartition(".")[2] for name, module in model.named_modules() if module is not head} & set(layers)
    try:
        # All other weights are frozen by this, and LoRA's are kept in float32.
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"lora_modules: peft finds no {modules or 'default'} in {type(model).__name__}; its layers are "
            f"{', '.join(sorted(inner))}"
        ) from error
    # A verbalizer reads rows of the output head one by one.
    if adapted.get_base_model().get_output_embeddings() is not head:
        raise UserError(f"lora_modules: the output head stays as it is; take others of {', '.join(sorted(inner))}")
    return adapted


def _dtype(config: Any, rank: int) -> torch.dtype:
    """bfloat16 is for frozen weights: most of Adam's small steps would be rounded away in it."""
    if config["base_model_dtype"] == "auto":
        return torch.bfloat16 if torch.device(config["device"]).type == "cuda" and rank else torch.float32
    if config["base_model_dtype"] == "bfloat16" and not rank:
        getLogger().warning("base_model_dtype: weights that are trained in bfloat16 lose small steps; take float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config["base_model_dtype"]]


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _quiet(transformers: Any, show_progress: bool) -> Iterator[None]:
    """Show the bars of transformers only where bars are wanted; keep tokenizers from threads
    before a loader forks.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    if not show_progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _shortly(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__
