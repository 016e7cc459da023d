"""A table of the rows that prompts use, and nothing that a prompt could become is missing from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_text_models import write_gemma_model

from vlatune.data.compact_tokenizer import CompactTokenizer
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.prompt import PromptStyle, prompt_text
from vlatune.data.tokenizer import PretrainedTokenizer, Tokenizer, build_tokenizer

INSTRUCTIONS = ("put the red cube on the plate", "open_the drawer\nslowly", "pick up Zürich's bowl")
NO_STATE = np.zeros(0)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gemma") / "paligemma_tokenizer.model"
    texts = [prompt_text("pi05", text, np.linspace(-1.5, 1, 40)) for text in INSTRUCTIONS]
    return write_gemma_model(file, [*texts, "an umbrella, too"])


def greedy_numbers(folder: Path) -> Tokenizer:
    """A byte-level BPE whose pieces reach across spaces and numbers, `5 12` for one: no public tokenizer's do."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    texts = [prompt_text("pi05", text, random.uniform(-1.1, 1, 8)) for text in INSTRUCTIONS for _ in range(30)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, max_token_length=4, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return PretrainedTokenizer.from_name(str(folder))


@pytest.mark.parametrize("style", ["instruction", "newline", "pi05"])
def test_rows_of_the_compact_table_are_the_base_tables_for_the_same_texts(gemma, style: PromptStyle):
    base = build_tokenizer(str(gemma), ())
    compact = CompactTokenizer.for_prompts(base, style, INSTRUCTIONS)
    table = torch.randn(base.vocab_size, 4)
    small = table[list(compact.kept_ids)]
    assert compact.vocab_size == len(small) < base.vocab_size / 2
    for instruction in INSTRUCTIONS:
        for text in (instruction, prompt_text(style, instruction, np.array([-2.0, 0.3, 1.0]))):
            assert torch.equal(small[compact.encode(text)], table[base.encode(text)])
            assert [compact.piece(row) for row in compact.encode(text)] == [base.piece(t) for t in base.encode(text)]


def test_padding_beginning_and_end_are_kept(gemma):
    base = build_tokenizer(str(gemma), ())
    compact = CompactTokenizer.for_prompts(base, "instruction", INSTRUCTIONS)
    assert base.special_ids == (0, 1, 2)
    assert [compact.kept_ids[row] for row in compact.special_ids] == [0, 1, 2]
    assert list(compact.kept_ids) == sorted(set(compact.kept_ids))


@pytest.mark.parametrize("kind", ["gemma", "greedy"])
def test_no_state_is_written_with_an_unknown_token(gemma, tmp_path, kind):
    """Random states of many sizes; the greedy tokenizer's pieces depend on a number's neighbours."""
    base = build_tokenizer(str(gemma), ()) if kind == "gemma" else greedy_numbers(tmp_path)
    compact = CompactTokenizer.for_prompts(base, "pi05", INSTRUCTIONS)
    random = np.random.default_rng(1)
    for number in range(1500):
        state_S = random.uniform(-1.1, 1.1, random.integers(1, 20)).astype(np.float32)
        text = prompt_text("pi05", INSTRUCTIONS[number % 3], state_S)
        assert [compact.kept_ids[row] for row in compact.encode(text)] == base.encode(text)


def test_every_number_alone(gemma):
    compact = CompactTokenizer.for_prompts(build_tokenizer(str(gemma), ()), "pi05", INSTRUCTIONS)
    edges = np.linspace(-1, 1, 257)
    numbers = set()
    for value in (-7.0, *edges, 7.0):
        text = prompt_text("pi05", INSTRUCTIONS[0], np.array([value]))
        numbers.add(text.split("State: ")[1].split(";")[0])
        compact.encode(text)
    assert numbers == {str(number) for number in range(-1, 256)}


def test_an_unknown_token_is_named(gemma):
    compact = CompactTokenizer.for_prompts(build_tokenizer(str(gemma), ()), "newline", INSTRUCTIONS)
    with pytest.raises(
        DataError, match=r"no row for '▁u.*' of 'put the umbrella'.*--compact newline --texts FILE.*the whole table"
    ):
        compact.encode("put the umbrella")


def test_saved_in_a_language_and_taken_from_it(gemma, tmp_path):
    base = build_tokenizer(str(gemma), ())
    compact = CompactTokenizer.for_prompts(base, "newline", INSTRUCTIONS)
    language = Language(compact, None, {}).with_texts(INSTRUCTIONS)
    language.save(tmp_path)
    loaded = Language.load(tmp_path)
    assert loaded.identity == language.identity
    assert loaded.kept_ids == compact.kept_ids
    assert loaded.vocab_size == compact.vocab_size
    assert loaded.tokenizer_name is None
    text = f"{INSTRUCTIONS[0]}\n"
    assert torch.equal(loaded.prompts([text]).ids_BL, language.prompts([text]).ids_BL)
    assert Language.build(INSTRUCTIONS, tokenizer=str(gemma), encoder="none").kept_ids is None

    again = build_tokenizer(str(tmp_path), ())  # a policy that is trained further has the same rows
    assert again.identity == compact.identity
    with pytest.raises(ValueError, match="this tokenizer is compact already; leave --compact out"):
        CompactTokenizer.for_prompts(again, "newline", INSTRUCTIONS)


def test_a_policy_with_other_prompts_is_told_before_it_meets_them(gemma, tmp_path):
    compact = CompactTokenizer.for_prompts(build_tokenizer(str(gemma), ()), "newline", INSTRUCTIONS)
    language = Language(compact, None, {}).with_texts(INSTRUCTIONS)
    language.check_covers(INSTRUCTIONS, prompt="newline", folder=tmp_path, cache=Path("cache"))
    with pytest.raises(
        DataError, match=r"tokens of 'newline' prompts, and this policy's are 'pi05'.*--encoder none --compact pi05$"
    ):
        language.check_covers(INSTRUCTIONS, prompt="pi05", folder=tmp_path, cache=Path("cache"))
    with pytest.raises(DataError, match="lacks 'a new one'.*--encoder none --compact newline$"):
        language.check_covers(["a new one"], prompt="newline", folder=tmp_path, cache=Path("cache"))


def test_a_loader_reads_states_through_a_compact_table(small_cache, gemma):
    from vlatune.data.loader import ChunkLoader, LoaderConfig

    instructions = small_cache.language.known_texts
    base = Language.build(instructions, tokenizer=str(gemma), encoder="none")
    compact = CompactTokenizer.for_prompts(build_tokenizer(str(gemma), ()), "pi05", instructions)
    config = LoaderConfig(
        batch_size=6, horizon=2, cameras=("agentview",), prompt="pi05", state_normalisation="quantile"
    )
    seen = []
    for language in (base, Language(compact, None, {}).with_texts(instructions)):
        small_cache.__dict__["language"] = language
        try:
            seen.append(ChunkLoader(small_cache, config).batch(0).observation.prompts)
        finally:
            del small_cache.__dict__["language"]
    assert torch.equal(seen[0].mask_BL, seen[1].mask_BL)
    kept = torch.tensor(compact.kept_ids)
    assert torch.equal(kept[seen[1].ids_BL[seen[1].mask_BL]], seen[0].ids_BL[seen[0].mask_BL])
