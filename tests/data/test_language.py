import filecmp
import json
from pathlib import Path

import pytest
import torch
from small_text_models import write_gemma_model, write_t5

from vlatune.data import language as language_module
from vlatune.data.episodes import DataError
from vlatune.data.language import Language, check_available
from vlatune.data.sentencepiece_tokenizer import SentencePieceTokenizer
from vlatune.data.text_encoder import SeededT5, SeededT5Config
from vlatune.data.tokenizer import PretrainedTokenizer

TEXTS = ("put the red cube on the plate", "put the blue cube on the plate", "open the drawer")


@pytest.fixture(scope="module")
def language() -> Language:
    return Language.build(TEXTS)


def test_words_of_the_instructions_are_single_tokens_and_texts_differ(language):
    prompts = language.prompts(TEXTS)
    assert prompts.ids_BL.dtype == torch.int64
    assert prompts.mask_BL.dtype == torch.bool
    assert prompts.mask_BL.sum(1).tolist() == [8, 8, 4]  # the words and the end
    assert (prompts.ids_BL[0] != prompts.ids_BL[1]).sum() == 1
    assert language.prompts(TEXTS).embedding_BLE is None
    assert int(prompts.ids_BL.max()) < language.vocab_size


@pytest.mark.parametrize(("bucket", "padded"), [(1, 8), (8, 8), (5, 10), (48, 48)])
def test_padding_on_the_right_to_a_multiple_of_the_bucket(language, bucket, padded):
    prompts = language.prompts([TEXTS[2], TEXTS[0], TEXTS[2]], embeddings=True, bucket=bucket)
    assert prompts.ids_BL.shape == (3, padded)
    assert prompts.embedding_BLE is not None
    assert prompts.embedding_BLE.shape == (3, padded, language.embedding_width)
    assert prompts.mask_BL[:, 0].all()
    assert (prompts.mask_BL.int().diff(dim=1) <= 0).all()
    assert (prompts.ids_BL[~prompts.mask_BL] == 0).all()
    assert (prompts.embedding_BLE[~prompts.mask_BL] == 0).all()
    assert torch.equal(prompts.ids_BL[0], prompts.ids_BL[2])


def test_embeddings_are_the_t5s_for_the_same_tokens_alone(language):
    prompts = language.prompts(TEXTS, embeddings=True)
    assert prompts.embedding_BLE is not None
    encoder = SeededT5(SeededT5Config(vocab_size=language.vocab_size))
    for ids_L, mask_L, embedding_LE in zip(prompts.ids_BL, prompts.mask_BL, prompts.embedding_BLE, strict=True):
        (alone_LE,) = encoder.encode_each([ids_L[mask_L].tolist()])
        torch.testing.assert_close(embedding_LE[mask_L], alone_LE, rtol=0, atol=0)
    assert (prompts.embedding_BLE[0] - prompts.embedding_BLE[1]).abs().max() > 0.1


def test_order_and_repetition_of_the_texts_do_not_matter(language):
    other = Language.build([*reversed(TEXTS), TEXTS[0]])
    assert other.identity == language.identity
    assert other.known_texts == language.known_texts == tuple(sorted(TEXTS))
    one, two = language.prompts(TEXTS, embeddings=True), other.prompts(TEXTS, embeddings=True)
    assert torch.equal(one.ids_BL, two.ids_BL)
    assert torch.equal(one.embedding_BLE, two.embedding_BLE)


def test_a_trained_tokenizer_has_the_same_bytes_whatever_the_order():
    one, two = SentencePieceTokenizer.train(TEXTS), SentencePieceTokenizer.train([*reversed(TEXTS), *[TEXTS[0]] * 9])
    assert one.identity == two.identity
    assert one.identity != SentencePieceTokenizer.train(TEXTS[:2]).identity


def test_building_does_not_touch_torchs_random_state():
    state = torch.random.get_rng_state()
    Language.build(TEXTS[:1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_and_loaded_it_is_the_same_and_small(language, tmp_path):
    language.save(tmp_path / "one")
    loaded = Language.load(tmp_path / "one")
    assert (loaded.identity, loaded.known_texts) == (language.identity, language.known_texts)
    assert (loaded.vocab_size, loaded.embedding_width) == (language.vocab_size, language.embedding_width)
    texts = [*TEXTS, "put the drawer on the ☃"]
    before, after = language.prompts(texts, embeddings=True), loaded.prompts(texts, embeddings=True)
    assert torch.equal(before.ids_BL, after.ids_BL)
    assert torch.equal(before.embedding_BLE, after.embedding_BLE)

    loaded.save(tmp_path / "two")  # the text that came later is not part of it
    same = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", [p.name for p in (tmp_path / "one").iterdir()], False)
    assert len(same[0]) == 3
    assert not same[1]
    assert not same[2]
    assert sum(p.stat().st_size for p in (tmp_path / "one").iterdir()) < 40_000


def test_loading_needs_no_encoder_for_known_texts(language, tmp_path, monkeypatch):
    language.save(tmp_path)
    monkeypatch.setattr(SeededT5, "_model", property(lambda self: pytest.fail("the encoder was built")))
    Language.load(tmp_path).prompts(TEXTS, embeddings=True)


def test_an_unknown_text_falls_back_to_letters_and_bytes(language):
    prompts = language.prompts(["Zürich ☃"], embeddings=True)
    assert 8 < int(prompts.mask_BL.sum()) < 30
    assert not (prompts.ids_BL[prompts.mask_BL] == 2).any()  # nothing is unknown
    assert prompts.embedding_BLE is not None
    assert prompts.embedding_BLE.isfinite().all()


def test_of_ever_new_texts_the_latest_are_kept(tmp_path, monkeypatch):
    """The table's own stay; a new text that was dropped is encoded again, to the same."""
    monkeypatch.setattr(language_module, "MAX_NEW_TEXTS", 2)
    built = Language.build(TEXTS)
    first = built.prompts(["text a"], embeddings=True).embedding_BLE
    for text in ("text b", "text c", "text b", "text d"):
        built.prompts([text], embeddings=True)
    assert list(built._table)[len(built.table_texts) :] == ["text c", "text d"]
    assert set(TEXTS) <= set(built._table)
    assert torch.equal(built.prompts(["text a"], embeddings=True).embedding_BLE, first)


def test_an_encoder_that_comes_out_differently_refuses_new_texts(language, tmp_path):
    language.save(tmp_path)
    index = tmp_path / "language.json"
    sha256 = language.identity["encoder"]["weights_sha256"]
    index.write_text(index.read_text().replace(sha256, "0" * 64))
    loaded = Language.load(tmp_path)
    loaded.prompts(TEXTS, embeddings=True)
    loaded.prompts(["a new text"])
    with pytest.raises(DataError, match="draws other weights for the seeded text encoder"):
        loaded.prompts(["a new text"], embeddings=True)


def test_without_an_encoder_there_are_ids_only(tmp_path):
    Language.build(TEXTS, encoder="none").save(tmp_path)
    loaded = Language.load(tmp_path)
    assert loaded.embedding_width is None
    assert loaded.prompts(TEXTS).mask_BL.any()
    with pytest.raises(ValueError, match="this language has no text encoder; prepare the cache again with --encoder"):
        loaded.prompts(TEXTS, embeddings=True)


@pytest.mark.parametrize("texts", [[], [" "], ["fine", ""]])
def test_blank_instructions_are_refused(texts):
    with pytest.raises(DataError, match="an instruction is blank"):
        Language.build(texts, encoder="none")


def test_blank_and_missing_prompts_are_refused(language):
    with pytest.raises(DataError, match="an instruction is blank"):
        language.prompts([""])
    with pytest.raises(ValueError, match="0 texts and a bucket of 8"):
        language.prompts([])


def test_missing_damaged_and_foreign_folders(language, tmp_path):
    with pytest.raises(DataError, match=r"no whole language in .*\(no language.json\)"):
        Language.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    language.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"tokenizer\.model was altered"):
        Language.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"lacks tokenizer\.model"):
        Language.load(tmp_path)
    (tmp_path / "table.safetensors").write_bytes(b"12345678")
    with pytest.raises(DataError, match=r"table\.safetensors was altered: its sha256 is not the recorded one"):
        Language.load(tmp_path)
    language.save(tmp_path)
    (tmp_path / "table.safetensors").unlink()
    with pytest.raises(DataError, match=r"no whole language in .*\(no table\.safetensors\)"):
        Language.load(tmp_path)
    language.save(tmp_path)
    index = tmp_path / "language.json"
    whole = json.loads(index.read_text())
    for damaged in (
        "{",
        "[]",
        json.dumps({**whole, "texts": whole["texts"][:1]}),
        json.dumps({**whole, "identity": {}}),
    ):
        index.write_text(damaged)
        with pytest.raises(DataError, match="is damaged .* copy the whole folder again"):
            Language.load(tmp_path)
    index.write_text(json.dumps({**whole, "format_version": 99}))
    with pytest.raises(DataError, match="has language format 99, this vlatune reads 1"):
        Language.load(tmp_path)


def test_a_folder_without_a_checksum_is_read_as_before(language, tmp_path):
    language.save(tmp_path)
    index = tmp_path / "language.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "table_sha256"}))
    assert Language.load(tmp_path).known_texts == language.known_texts


@pytest.fixture(scope="module")
def public_t5(tmp_path_factory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"), TEXTS, num_layers=1)


def test_a_public_tokenizer_and_t5_by_folder(public_t5, tmp_path):
    check_available(str(public_t5), str(public_t5))
    language = Language.build(TEXTS, tokenizer=str(public_t5), encoder=str(public_t5))
    assert language.identity["encoder"]["dtype"] == "bfloat16"
    assert "model.safetensors" in language.identity["encoder"]["files"]
    assert "tokenizer.json" in language.identity["tokenizer"]["files"]
    assert language.embedding_width == 16
    language.save(tmp_path)
    loaded = Language.load(tmp_path)
    texts = [*TEXTS, "open the plate"]
    before, after = language.prompts(texts, embeddings=True), loaded.prompts(texts, embeddings=True)
    assert before.mask_BL.sum(1).tolist() == [8, 8, 4, 4]
    assert before.embedding_BLE.dtype == torch.float32
    assert torch.equal(before.ids_BL, after.ids_BL)
    assert torch.equal(before.embedding_BLE, after.embedding_BLE)


def test_an_encoder_reads_its_own_tokens_only(public_t5):
    with pytest.raises(DataError, match="reads its own tokens, not those of tokenizer 'trained'; add --tokenizer"):
        check_available("trained", str(public_t5))


def test_unreachable_names_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no tokenizer .* can be loaded .*or --tokenizer trained"):
        Language.build(TEXTS, tokenizer=str(tmp_path), encoder="none")


def test_another_caches_tokenizer_reads_new_instructions_with_the_same_tokens(small_cache):
    folder = str(small_cache.path / "language")
    known = small_cache.language.known_texts[0]
    language = Language.build(["pick up the violet cube", known], tokenizer=folder, encoder="none")
    assert language.vocab_size == small_cache.language.vocab_size
    assert torch.equal(language.prompts([known]).ids_BL, small_cache.language.prompts([known]).ids_BL)
    assert language.prompts(["pick up the violet cube"]).ids_BL.max() < language.vocab_size


def test_a_sentencepiece_file_begins_texts_as_openpi_does(tmp_path):
    import sentencepiece

    file = write_gemma_model(tmp_path / "openpi" / "paligemma_tokenizer.model", TEXTS)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for name in (str(file), str(file.parent)):  # the folder too: AutoTokenizer would read it without the beginning
        language = Language.build(TEXTS, tokenizer=name, encoder="none")
        # openpi's π0: the text, then the line break by itself.
        expected = theirs.encode(TEXTS[0], add_bos=True) + theirs.encode("\n")
        prompts = language.prompts([f"{TEXTS[0]}\n"], bucket=1)
        assert prompts.ids_BL[0].tolist() == expected
        assert expected[0] == theirs.bos_id() == 2
        assert language.vocab_size == theirs.vocab_size()
        assert language.tokenizer_name is None
    language.save(tmp_path / "language")
    file.unlink()
    loaded = Language.load(tmp_path / "language")
    assert torch.equal(loaded.prompts(["open the plate"]).ids_BL, language.prompts(["open the plate"]).ids_BL)
    assert loaded.identity == language.identity


def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match=r"tokenizer\.model is not a sentencepiece model; copy it again"):
        Language.build(TEXTS, tokenizer=str(tmp_path), encoder="none")


def test_a_clip_tokenizer_by_folder_begins_and_ends_its_texts(tmp_path):
    letters = [*"acdehlnopqrtu", *(f"{letter}</w>" for letter in "acdehlnopqrtu")]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    language = Language.build(["Open a door"], tokenizer=str(tmp_path), encoder="none")
    assert language.pieces("Open a door") == [
        "<|startoftext|>", "o", "p", "e", "n</w>", "a</w>", "d", "o", "o", "r</w>", "<|endoftext|>"
    ]  # fmt: skip
    assert language.vocab_size == len(vocabulary)


def test_tokens_that_no_text_becomes_need_no_row(public_t5, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(public_t5)
    num_texts = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as PaliGemma's has one beyond π0's table
    tokenizer.save_pretrained(tmp_path)
    ours = PretrainedTokenizer.from_name(str(tmp_path))
    assert (len(tokenizer), ours.vocab_size) == (num_texts + 1, num_texts)
    assert ours.encode(TEXTS[0]) == tokenizer(TEXTS[0])["input_ids"]
    with pytest.raises(DataError, match="has '<image>', which stands for no text"):
        ours.encode("put the <image> on the plate")


def test_a_text_that_changed(language, tmp_path):
    check = {"prompt": "instruction", "folder": tmp_path / "lang", "cache": tmp_path / "cache"}
    language.check_covers([*TEXTS, TEXTS[0]], **check)
    again = f"rm -r {tmp_path}/lang && vlatune embed {tmp_path}/cache --out {tmp_path}/lang --tokenizer trained --encoder seeded-t5"
    with pytest.raises(DataError, match=f"lacks 'open the box', an instruction of .*2 missing in all.*{again}"):
        language.check_covers([TEXTS[0], "open the box", "open the box", "close it"], **check)


def test_the_command_that_makes_a_language_again(public_t5, tmp_path):
    check = {"prompt": "instruction", "folder": Path("lang"), "cache": Path("cache")}
    for tokenizer, encoder, options in (
        (public_t5, public_t5, f"--tokenizer {public_t5} --encoder {public_t5} --dtype bfloat16"),
        (public_t5, "none", f"--tokenizer {public_t5} --encoder none"),
        (write_gemma_model(tmp_path / "one.model", TEXTS), "none", r"--tokenizer FILE\.model --encoder none"),
    ):
        language = Language.build(TEXTS, tokenizer=str(tokenizer), encoder=str(encoder))
        with pytest.raises(DataError, match=f"vlatune embed cache --out lang {options}$"):
            language.check_covers(["another"], **check)


def test_a_table_that_does_not_fit_its_texts(language):
    with pytest.raises(ValueError, match="'open the drawer' has 4 tokens and features of 3"):
        language.with_texts(["open the drawer"], [torch.zeros(3, 64)])
    with pytest.raises(ValueError, match="if it has an encoder, and none otherwise"):
        language.with_texts(["open the drawer"])
