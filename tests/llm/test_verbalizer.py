"""Scores of candidates: equal to plain forward passes, however rows are padded, batched and prefixed."""

import random

import pytest
import tokenizers
import torch
import transformers

from recbole_ssm.errors import UserError
from recbole_ssm.llm.base import LETTERS, RANDOM_SIZES, random_tokenizer
from recbole_ssm.llm.prompt import Prompts, Question, prompt_words
from recbole_ssm.llm.verbalizer import VERBALIZERS, Verbalizer, buckets

TITLES = ["", *(f"The {a} {b}" for a in ("red", "blue", "green", "old") for b in ("house", "river of war", "day"))]
TOKENIZER = random_tokenizer([*TITLES, *prompt_words()], 1000)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}


def llama():
    sizes = {**RANDOM_SIZES, **SIZES, "vocab_size": len(TOKENIZER)}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(TOKENIZER), **sizes, **ends))


def qwen2():
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER)}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def gemma2():
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER), "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5))


def prompts_of(kind="letters", **options):
    answer = "title" if kind == "title_likelihood" else "letter"
    sizes = {"history": 20, "candidates": 5, "title_tokens": 8, "max_tokens": 900, "answer": answer, **options}
    return Prompts(TOKENIZER, TITLES, **sizes)


def questions_of(prompts, count=6):
    rng = random.Random(0)
    found = []
    for number in range(count):
        candidates = rng.sample(range(1, len(TITLES)), 5)
        history = rng.choices(range(1, len(TITLES)), k=3 * number + 1)
        titles = [prompts.titles[item] for item in candidates]
        found.append(Question(prompts.write(history, candidates), titles))
    return found


def plain(model, prompts, questions, kind):
    """One forward pass a row, or a title, over the whole vocabulary at all positions."""
    rows = []
    for question in questions:
        prompt = [*prompts.prefix, *question.prompt]
        if kind == "title_likelihood":
            row = []
            for title in question.answers:
                log_p = model(input_ids=torch.tensor([prompt + title])).logits[0].log_softmax(-1)
                row.append(torch.stack([log_p[len(prompt) - 1 + n, token] for n, token in enumerate(title)]).mean())
            rows.append(torch.stack(row))
            continue
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        wanted = [[t] for t in prompts.letters] if kind == "letters" else question.answers
        rows.append(torch.stack([logits[tokens].mean() for tokens in wanted]))
    return torch.stack(rows)


@pytest.mark.parametrize("build", [llama, gpt2, qwen2])
@pytest.mark.parametrize("kind", VERBALIZERS)
@torch.no_grad()
def test_row_by_row_batched_and_prefixed_are_the_plain_scores(build, kind):
    torch.manual_seed(0)
    model, prompts = build().double().eval(), prompts_of(kind)
    questions = questions_of(prompts)
    expected = plain(model, prompts, questions, kind).float()
    assert expected.std() > 0.05
    for batch_tokens in (1, 300, 10**6):
        for share_prefix in (True, False):
            found = Verbalizer(model, prompts, kind, batch_tokens, share_prefix).scores(questions)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VERBALIZERS)
def test_what_is_learned_from_is_what_is_ranked_by(kind):
    """Log-probabilities differ from scores by a constant of the row, and carry gradients."""
    torch.manual_seed(0)
    model, prompts = llama().eval(), prompts_of(kind)
    questions = questions_of(prompts)
    verbalizer = Verbalizer(model, prompts, kind)
    log_p = verbalizer.log_probabilities(questions)
    torch.testing.assert_close(
        log_p.log_softmax(-1), verbalizer.scores(questions).log_softmax(-1), rtol=1e-4, atol=1e-4
    )
    assert (log_p <= 0).all()
    log_p.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_log_probabilities_of_letters_are_over_the_vocabulary():
    model, prompts = llama().eval(), prompts_of()
    question = questions_of(prompts, 1)
    logits = model(input_ids=torch.tensor([[*prompts.prefix, *question[0].prompt]])).logits[0, -1]
    found = Verbalizer(model, prompts, "letters").log_probabilities(question)[0]
    torch.testing.assert_close(found, logits.log_softmax(-1)[prompts.letters], rtol=1e-4, atol=1e-4)


def test_a_model_that_bends_its_logits_is_refused():
    with pytest.raises(UserError, match="base_model: Gemma2ForCausalLM changes its logits after its output head"):
        Verbalizer(gemma2().eval(), prompts_of(), "letters")


def mistral(window):
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER)}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=window)).eval()


def gemma3(window):
    """A model of text and images, whose window stands in the configuration of its text."""
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER), "head_dim": 8}
    text = {**sizes, "sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    images = {**SIZES, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 2, "boi_token_index": 3, "eoi_token_index": 4, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=images, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [mistral, gemma3])
def test_windows_of_attention_are_heeded_or_refused(build):
    """A title must see its prompt through the mask that titles need, which knows no window."""
    torch.manual_seed(0)
    prompts = prompts_of("title_likelihood")
    lengths = [len(prompts.prefix) + len(question.prompt) for question in prompts.examples()]
    narrow, wide = build(sum(lengths) // 2), build(900)
    with pytest.raises(UserError, match="title_likelihood does not give the scores of plain .* off"):
        Verbalizer(narrow, prompts, "title_likelihood")
    Verbalizer(wide, prompts, "title_likelihood")
    assert (prompts.written, prompts.shortened) == (0, 0)
    prompts = prompts_of()
    questions = questions_of(prompts)
    found = Verbalizer(narrow, prompts, "letters").scores(questions)
    torch.testing.assert_close(found, plain(narrow, prompts, questions, "letters"), rtol=1e-3, atol=1e-3)


def test_the_comparison_is_of_prompts_as_long_as_they_become():
    prompts = prompts_of("title_likelihood")
    long = max(range(1, len(TITLES)), key=lambda item: len(prompts.titles[item]))
    short = next(item for item in range(1, len(TITLES)) if len(prompts.titles[item]) < len(prompts.titles[long]))
    titles = ["", *[TITLES[short]] * 30, *[TITLES[long]] * 30]
    prompts = Prompts(TOKENIZER, titles, history=20, candidates=5, title_tokens=8, max_tokens=900, answer="title")
    question = prompts.examples()[0]
    assert question.prompt == prompts.write([40] * 20, [40] * 5) and question.answers == [prompts.titles[40]] * 2


@pytest.mark.parametrize("kind", VERBALIZERS)
def test_layers_without_keys_share_no_prefix_and_titles_of_them_are_refused(kind):
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER)}
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
    ).eval()
    prompts = prompts_of(kind)
    if kind == "title_likelihood":
        with pytest.raises(UserError, match="verbalizer: title_likelihood does not give the scores of plain .* Lfm2"):
            Verbalizer(model, prompts, kind)
        return
    verbalizer, questions = Verbalizer(model, prompts, kind), questions_of(prompts)
    assert not verbalizer.share_prefix
    torch.testing.assert_close(
        verbalizer.scores(questions), plain(model, prompts, questions, kind), rtol=1e-3, atol=1e-3
    )


def test_a_head_with_a_bias_has_no_embeddings_of_titles():
    model = llama().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(TOKENIZER)))
    with pytest.raises(UserError, match="verbalizer: embedding needs an output head without a bias"):
        Verbalizer(model, prompts_of(), "embedding")


def test_buckets_hold_every_row_once_and_the_budget():
    rng = random.Random(0)
    lengths = [rng.randint(1, 50) for _ in range(200)] + [900]
    found = buckets(lengths, 256)
    assert sorted(row for group in found for row in group) == list(range(201))
    assert all(len(group) * max(lengths[row] for row in group) <= 256 for group in found[:-1])
    assert found[-1] == [200]
    padded = sum(len(group) * max(lengths[row] for row in group) for group in found)
    assert padded < 1.3 * sum(lengths)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_prompt_is_llamarecs():
    prompts = prompts_of(candidates=3)
    text = TOKENIZER.decode([*prompts.prefix, *prompts.write([1, 5], [2, 3, 4])])
    assert text == (
        "### Instruction:\nGiven user history in chronological order, recommend an item from the candidate pool with "
        "its index letter.\n\n### Input:\nUser history: (1) The red house \n (2) The blue river of war; \n "
        "Candidate pool: (A) The red river of war \n (B) The red day \n (C) The blue house\n\n### Response:\n"
    )
    assert [TOKENIZER.decode([letter]) for letter in prompts.letters] == ["A", "B", "C"]


def sentencepiece():
    """A tokenizer as Llama-2's is: spaces are a letter of words, and a text begins with one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), space])
    replace, strip = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Strip(" ", 1, 0)
    fallback, fuse = tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence([replace, fallback, fuse, strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=[*LETTERS, "▁"])
    words = [word for text in [*TITLES, *prompt_words()] for word in text.split()]  # merges stay within words
    tokenizer.train_from_iterator(words, trainer)
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def test_pieces_are_encoded_as_they_stand_within_the_text():
    """SentencePiece's tokenizers, Llama-2's among them, put a space before every text, so before every piece too."""
    tokenizer = sentencepiece()
    prompts = Prompts(tokenizer, TITLES, history=20, candidates=3, title_tokens=40, max_tokens=2000)
    tokens = [*prompts.prefix, *prompts.write([1, 5], [2, 3, 4])]
    text = TOKENIZER.decode([*prompts_of(candidates=3).prefix, *prompts_of(candidates=3).write([1, 5], [2, 3, 4])])
    assert tokenizer.decode(tokens) == text
    assert [*tokens, *prompts.letters[:1]] == tokenizer(f"{text}A", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompts.letters) == ["A", "B", "C"]


def test_long_histories_lose_their_oldest_titles():
    roomy = prompts_of(history=6)
    whole = len(roomy.prefix) + len(roomy.write([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11])) + 1
    assert (roomy.written, roomy.shortened) == (1, 0)
    tight = prompts_of(history=6, max_tokens=whole - 1)
    text = TOKENIZER.decode(tight.write([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]))
    assert text.startswith(f" (1) {TITLES[2]} \n (2) {TITLES[3]}") and f"(5) {TITLES[6]};" in text
    assert (tight.written, tight.shortened) == (1, 1)
    exact = prompts_of(history=6, max_tokens=whole)
    assert exact.write([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]) == roomy.write([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11])
    assert exact.shortened == 0


def test_only_the_newest_titles_and_the_first_tokens_of_long_ones_are_shown():
    whole, prompts = prompts_of(), prompts_of(history=2, title_tokens=3)
    assert prompts.titles == [title[:3] for title in whole.titles] != whole.titles
    text = TOKENIZER.decode(prompts.write([1, 2, 5], [7, 8, 9, 10, 11]))
    second, fifth = (TOKENIZER.decode(prompts.titles[item]) for item in (2, 5))
    assert text.startswith(f" (1){second} \n (2){fifth};")


def test_the_tokenizer_may_begin_a_text():
    class Begins:
        bos_token_id = 1

        convert_ids_to_tokens = TOKENIZER.convert_ids_to_tokens

        def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    prompts = Prompts(Begins(), TITLES, history=2, candidates=2, title_tokens=8, max_tokens=900)
    assert prompts.prefix == [1, *prompts_of().prefix]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 27}, "num_candidates: 27 are more than the 26 letters that name them; try num_candidates: 20"),
        ({"max_tokens": 60}, "prompt_tokens: 5 candidates of up to .* leave no room for a history in 60 tokens; try"),
    ],
)
def test_prompts_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        prompts_of(**options)


@pytest.mark.parametrize(
    ("letter", "message"),
    [([7, 8], "splits the letter A into 2 tokens"), ([7], "has one token for A and another letter")],
)
def test_a_tokenizer_that_does_not_tell_letters_apart(letter, message):
    class Splits:
        bos_token_id = None
        convert_ids_to_tokens = TOKENIZER.convert_ids_to_tokens

        def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": letter if text in LETTERS else ids}

    prompts = Prompts(Splits(), TITLES, history=2, candidates=2, title_tokens=8, max_tokens=900)
    model = llama().eval()
    with pytest.raises(UserError, match=f"base_model: its tokenizer {message}, and verbalizer: letters"):
        Verbalizer(model, prompts, "letters")
    Verbalizer(model, prompts, "embedding")  # which reads none
