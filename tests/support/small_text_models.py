"""Tokenizers and text encoders as the hub has them, tiny and with random weights."""

import io
import json
from collections.abc import Sequence
from pathlib import Path


def write_t5(folder: Path, texts: Sequence[str], *, num_layers: int = 2, vocab_size: int | None = None) -> Path:
    """A word tokenizer of transformers' own and a T5 encoder, as AutoTokenizer and AutoModel read them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in " ".join(texts).split():
        vocabulary.setdefault(word, len(vocabulary))
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=vocab_size or len(vocabulary),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=num_layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
    return folder


def write_gemma_model(file: Path, texts: Sequence[str]) -> Path:
    """A sentencepiece file with the conventions of PaliGemma's: pad 0, end 1, beginning 2, digits and line breaks by themselves, no
    space put in front, and a token that no text has."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(set(texts))),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", "<loc0000>"],
        num_threads=1,
        minloglevel=2,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())
    return file


def without_empty_text(folder: Path) -> Path:
    """A language's folder as it was before the empty text was kept; changes it in place."""
    from safetensors.torch import load, save

    index = json.loads((folder / "language.json").read_text())
    assert index["texts"].pop() == {"text": "", "num_tokens": 1}
    del index["table_sha256"]
    table = folder / "table.safetensors"
    table.write_bytes(save({name: tensor[:-1].clone() for name, tensor in load(table.read_bytes()).items()}))
    (folder / "language.json").write_text(json.dumps(index))
    return folder
