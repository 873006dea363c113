"""Base models: what is loaded, what is refused, and what a checkpoint holds of them."""

import json
import shutil
from fnmatch import fnmatch

import peft
import pytest
import torch
import transformers

from recbole_ssm.errors import UserError
from recbole_ssm.llm import base
from recbole_ssm.llm.base import END, LETTERS, load_base_model, random_tokenizer, size_of
from recbole_ssm.llm.prompt import piece_encoder
from recbole_ssm.quick_start import configure

TEXTS = ["Toy Story", "GoldenEye", "Four Rooms", "Get Shorty"]


class Options(dict):
    def __missing__(self, key):
        return None


def load(base_model="random", texts=TEXTS, **options):
    defaults = {
        "device": "cpu", "seed": 1, "show_progress": False, "base_model_dtype": "auto", "lora_alpha": 32.0,
        "lora_dropout": 0.0, "random_base_args": {"vocab_size": 400, "num_hidden_layers": 1},
    }  # fmt: skip
    return load_base_model(Options({**defaults, "base_model": str(base_model), **options}), texts)


@pytest.fixture
def folder(tmp_path):
    """A tiny GPT-2 with its tokenizer, as save_pretrained writes them."""
    tokenizer = random_tokenizer(TEXTS, 400)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=0))
    path = tmp_path / "gpt2"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_random_base_is_the_same_again_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = load(), load(), load(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)
    assert first.digest == second.digest == other.digest  # all weights are trained, so checkpoints hold them
    assert load(lora_r=2).digest == load(lora_r=2).digest != load(lora_r=2, seed=2).digest
    assert load(texts=["Other words"]).digest != first.digest


def test_letters_are_single_tokens_of_a_random_base_and_any_text_comes_back():
    tokenizer = random_tokenizer([*TEXTS, "A AA AAA " * 50], 400)
    for letter in LETTERS:
        assert len(tokenizer(letter).input_ids) == len(tokenizer(f" {letter}").input_ids) == 1
    for text in ("naïve 東京 \n\t x", "Toy Story"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, 0) and tokenizer.pad_token_id == 1


def test_a_title_that_reads_like_a_special_token_is_a_text():
    tokenizer = random_tokenizer([f"The {END} of days"] * 50, 400)
    tokens = piece_encoder(tokenizer)(f" The {END} of days")
    assert tokenizer.eos_token_id not in tokens and tokenizer.decode(tokens) == f" The {END} of days"
    assert tokenizer(END).input_ids == [tokenizer.eos_token_id]


def test_a_folder_is_loaded_with_and_without_lora(folder):
    whole, lora = load(folder, lora_r=0), load(folder)
    assert all(p.requires_grad for p in whole.model.parameters())
    trained = [name for name, p in lora.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(whole.model(tokens).logits, lora.model(tokens).logits)  # LoRA starts as nothing
    assert (whole.context, whole.name, whole.model.training) == (64, str(folder), False)
    assert next(load(folder, base_model_dtype="bfloat16", lora_r=0).model.parameters()).dtype == torch.bfloat16


def test_the_context_of_a_model_of_text_and_images_is_that_of_its_text(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 400, "max_position_embeddings": 96, "head_dim": 8, "num_key_value_heads": 1}
    images = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    found = load(folder, lora_r=0)
    assert found.context == 96 and not found.model.config.text_config.use_cache


def test_a_model_without_a_limit_says_so(folder, caplog):
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 400}
    transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).save_pretrained(folder)
    caplog.set_level("INFO")
    assert load(folder, lora_r=0).context >= base.UNLIMITED
    assert caplog.messages[-1].endswith("context unlimited")


def test_the_digest_is_of_weights_that_stay_frozen(folder):
    first, whole = load(folder).digest, load(folder, lora_r=0).digest
    assert first == load(folder, base_model_dtype="bfloat16").digest != whole
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    model.save_pretrained(folder)
    assert load(folder).digest != first and load(folder, lora_r=0).digest == whole


@pytest.mark.parametrize("download", [False, True])
def test_a_name_is_looked_for_in_the_cache_and_fetched_only_where_asked(folder, monkeypatch, download):
    asked = []

    def snapshot(name, local_files_only, allow_patterns, ignore_patterns):
        assert fnmatch("consolidated.safetensors", ignore_patterns[0])
        assert not fnmatch("model-00001-of-00002.safetensors", ignore_patterns[0])
        asked.append((name, local_files_only))
        assert not any(pattern.endswith((".bin", ".pt", ".py", ".pickle")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("some/model", base_model_download=download).context == 64
    assert asked == [("some/model", not download)]


def test_lora_on_named_layers(folder):
    trained = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, p in load(folder, lora_modules=["c_proj"]).model.named_parameters()
        if p.requires_grad
    }
    assert trained == {"c_proj"}


def make_bert(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=60)).save_pretrained(folder)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def add_adapter(folder):
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2))
    adapted.save_pretrained(folder)


def drop_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 2}))


def drop_end(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))


def ask_for_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this ran')")


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (make_bert, "is BertForMaskedLM, no causal language model; take one such as"),
        (add_adapter, "holds an adapter of peft (adapter_config.json); give a folder of the merged model"),
        (cut, "transformers cannot load"),
        (drop_weights, "holds no *.safetensors (its weights are pickles, whose loading could run code)"),
        (drop_layer, "lacks the weights"),
        (ask_for_code, "transformers cannot load"),
        (drop_end, "has no token that ends a text (eos_token)"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer.json"),
    ],
)
def test_faulty_folders(folder, spoil, message, rank):
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load(folder, lora_r=rank)
    assert str(caught.value).startswith("base_model: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["some/kernel", {"": "some/kernel"}, "flash_attention_2"])
def test_a_folder_chooses_no_kernels(folder, monkeypatch, key, value):
    """Those of the hub would be fetched and imported, where the package kernels is installed."""
    fetched = []
    for name in ("is_kernels_available", "get_kernel"):
        monkeypatch.setattr(
            f"transformers.integrations.hub_kernels.{name}", lambda *a, **k: fetched.append(a) or True, raising=False
        )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "own": [{key: value}], key: value}))
    if value == "flash_attention_2":
        assert load(folder, lora_r=0).model.config._attn_implementation == "sdpa"
    else:
        with pytest.raises(UserError, match=f"asks for code of the hub by {key}: .*some/kernel.*; delete that"):
            load(folder)
    assert not fetched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"base_model": "no/such-model"},
            "base_model: no/such-model is no folder here and not in the Hugging Face cache",
        ),
        ({"base_model": "absent.gguf"}, "base_model: absent.gguf is no folder and no GGUF file"),
        ({"base_model": "/absent/folder"}, "base_model: /absent/folder is no folder and no GGUF file"),
        ({"lora_r": 2, "lora_modules": ["q"]}, "lora_modules: peft finds no ['q'] in LlamaForCausalLM; its layers are"),
        ({"lora_r": 2, "lora_modules": ["*_proj"]}, "lora_modules: peft finds no ['*_proj'] in LlamaForCausalLM"),
        ({"lora_r": 2, "lora_modules": ["q_proj", "lm_head"]}, "lora_modules: the output head stays as it is; take "),
        ({"quantize_4bit": True}, "quantize_4bit: weights of 4 bits stay as they are; name a trained base_model, and"),
        ({"quantize_4bit": True, "lora_r": 8}, "quantize_4bit: weights of 4 bits stay as they are"),
        ({"random_base_args": {"hidden": 3}}, "random_base_args: there is no size 'hidden'"),
        ({"random_base_args": {"_attn_implementation": "some/kernel"}}, "random_base_args: there is no size '_attn"),
        ({"random_base_args": {"attn_implementation": "some/kernel"}}, "random_base_args: there is no size 'attn_i"),
        ({"random_base_args": {"vocab_size": 10}}, "random_base_args: vocab_size must be at least 400"),
        ({"random_base_args": {"num_attention_heads": 5}}, "random_base_args: LlamaConfig refuses"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(UserError) as caught:
        load(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_model": ""}, "base_model: must be a folder, a .gguf file"),
        ({"lora_r": -1}, "lora_r: must be 0 or more, got -1"),
        ({"lora_r": "x"}, "lora_r: must be a whole number"),
        ({"lora_dropout": 1}, "lora_dropout: must lie in [0, 1), got 1; try lora_dropout: 0.05"),
        (
            {"lora_modules": 3},
            "lora_modules: must be 'all-linear' or a list in which each entry is the name of a layer",
        ),
        ({"lora_modules": [3]}, "lora_modules: must be 'all-linear' or a list in which each entry is the name of a"),
        ({"lora_modules": []}, "lora_modules: must be 'all-linear' or a list in which each entry is the name of a"),
        ({"random_base_args": 7}, "random_base_args: must be a mapping"),
    ],
)
def test_wrong_types_are_refused_by_the_table_of_keys(options, message):
    with pytest.raises(UserError) as caught:
        configure("LlamaRec", "toy", config_dict=options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_all_linear_leaves_the_head_alone():
    for modules, count in ((["q_proj"], 1), (["q_proj", "v_proj"], 2), ("all-linear", 7), (None, 2)):
        model = load(lora_r=2, lora_modules=modules).model
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * count and not any("lm_head" in name for name in trained)


def test_what_is_trained_is_held_in_float32(caplog):
    """Of Adam's small steps bfloat16 rounds most away; LoRA's own matrices stay in float32 beside frozen ones."""
    assert {p.dtype for p in load(base_model_dtype="auto").model.parameters()} == {torch.float32}
    assert not caplog.messages
    assert {p.dtype for p in load(base_model_dtype="bfloat16").model.parameters()} == {torch.bfloat16}
    assert caplog.messages == ["base_model_dtype: weights that are trained in bfloat16 lose small steps; take float32"]
    lora = load(base_model_dtype="bfloat16", lora_r=2).model
    assert {(p.requires_grad, p.dtype) for p in lora.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    assert base._dtype({"base_model_dtype": "auto", "device": "cuda"}, 8) == torch.bfloat16
    assert base._dtype({"base_model_dtype": "auto", "device": "cuda"}, 0) == torch.float32


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_computes_the_same(rank):
    gradients, recomputed = [], []
    for chosen in (False, True):
        torch.manual_seed(0)
        model = load(lora_r=rank, gradient_checkpointing=chosen).model.train()
        plain = model.get_base_model() if rank else model
        calls = []
        plain.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    torch.testing.assert_close(*gradients)


def test_packed_weights_are_counted_as_what_they_stand_for():
    class Params4bit(torch.nn.Parameter):
        pass

    packed = Params4bit(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)
    assert size_of([packed, torch.zeros(3, 4)]) == 100 + 12


def test_four_bits_need_a_gpu(folder):
    with pytest.raises(UserError, match="quantize_4bit: bitsandbytes needs a GPU here; leave it False"):
        load(folder, quantize_4bit=True)


def test_a_missing_package_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match="peft is needed and cannot be imported .*; pip install peft"):
        load(folder)
    assert load(folder, lora_r=0).name == str(folder)
    with pytest.raises(UserError, match="peft is needed"):
        load(shutil.copytree(folder, folder.with_name("copy")))
