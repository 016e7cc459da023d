"""``vlatune embed CACHE --out LANGUAGE``: the instructions of a cache for another tokenizer and text encoder, beside the cache.

So that one cache of pictures serves policies that read text differently: T5-XXL features for RDT, PaliGemma's token ids for π0.5. Training
reads the folder with `--language`. Started by a launcher (`deepspeed --module vlatune.data.embed …`, torchrun), each rank encodes its
share of the texts; the folder is the same, byte for byte on equal devices.

Torch and transformers are imported where the work begins: `--help` answers at once.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm

from .episodes import DataError
from .files import full_disk_said
from .prompt import PromptStyle

if TYPE_CHECKING:
    from .language import Language
    from .language_writer import LanguageWriter
    from .text_encoder import TextEncoder
    from .tokenizer import Tokenizer

LAUNCHED_AT = time.time()
"""When this process began, near enough, and so before any rank of the same launch took up its work."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Instructions of caches -> token ids and text features, for `vlatune train --language`. Killed, it continues where it was."""

    caches: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What `vlatune prepare` wrote, one or several; they are only read."""
    out: Path
    """The folder to make. An equal one that is there is left as it is; a different one is refused."""
    tokenizer: str
    """A public tokenizer's name or folder, a sentencepiece file (PaliGemma's, as openpi has it), the language folder of a cache or a
    checkpoint, or `trained` (sentencepiece, on these instructions)."""
    encoder: str
    """The name or folder of a T5 (with its own tokenizer), `none` for policies that read token ids (PaliGemma, SmolVLM, CLIP), or
    `seeded-t5` (small, random, recorded)."""
    texts: Path | None = None
    """A file with more texts, one a line: instructions that the policy will meet and the caches do not have."""
    compact: PromptStyle | None = None
    """Keep only the token rows that prompts of this style (the policy's `prompt`) can use, so that training holds a table of a few hundred
    rows instead of Gemma's 257,152; a text with another token is refused later. For `pi05`, every number of a state is kept."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of a public T5's weights and features (the seeded one has float32). float16 is not offered: T5 overflows in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a public T5 runs; auto is CUDA where there is one. The XXL takes 9.5 GB in bfloat16."""
    layer_by_layer: bool = False
    """Read a public T5's blocks from disk one at a time: less than 2 GB for the XXL, with the same features, bit for bit."""
    patience_s: float = 3600.0
    """Of several ranks: how long rank 0 waits, in seconds, while no other finishes a text."""

    def __post_init__(self) -> None:
        if not self.caches:
            raise ValueError("no cache was given; type: vlatune embed CACHE --out LANGUAGE …")
        if self.compact is not None and self.encoder != "none":
            raise ValueError(
                f"--compact is for policies that look token ids up in a table of their own, and the encoder {self.encoder!r} reads the whole "
                "vocabulary; give --encoder none, or leave --compact out"
            )
        if self.layer_by_layer and self.encoder in ("none", "seeded-t5"):
            raise ValueError(f"--layer-by-layer is for a public T5, and the encoder is {self.encoder!r}; leave it out")
        if self.patience_s <= 0:
            raise ValueError(f"patience_s is {self.patience_s}; it must be more than 0")


def embed(config: EmbedConfig) -> Path:
    """Make the language's folder, or leave an equal one as it is; returns its path. Raises `DataError` in one sentence.

    Of several ranks, all but the first return when their texts are done, before the folder is there."""
    from .cache import unfinished_path
    from .language import Language
    from .language_writer import LanguageWriter, language_plan

    rank, world_size = launched_as()
    instructions = instructions_of(config)
    tokenizer, encoder = _build(config, instructions, show_progress=rank == 0)
    empty = Language(tokenizer, encoder, {})
    texts = empty.texts_to_keep(instructions)
    if config.out.exists():
        _check_equal(config, empty, texts)
        return config.out
    if rank > 0 and encoder is None:
        return config.out  # there is nothing to share
    with (
        full_disk_said(config.out),
        LanguageWriter(config.out, language_plan(empty, texts), rank=rank, world_size=world_size) as writer,
    ):
        if rank > 0 and config.out.exists():  # no text was undone, and rank 0 has finished meanwhile
            shutil.rmtree(unfinished_path(config.out), ignore_errors=True)
            return config.out
        if encoder is not None:
            _encode(config, writer, tokenizer, encoder, is_first=rank == 0)
        if rank == 0:
            writer.finish(empty.with_texts(texts, None if encoder is None else writer.features()))
    return config.out


def _encode(
    config: EmbedConfig, writer: "LanguageWriter", tokenizer: "Tokenizer", encoder: "TextEncoder", *, is_first: bool
) -> None:
    """This rank's share; the first rank then waits for the others'."""
    undone = [text for text in writer.own_texts if not writer.is_done(text)]
    with tqdm(
        desc="embed", unit="text", total=len(writer.texts), initial=writer.num_done, disable=not is_first
    ) as progress:

        def show(num_done: int) -> None:
            progress.update(num_done - progress.n)

        each = encoder.encode_each([tokenizer.encode(text) for text in undone]) if undone else iter(())
        for text, features_LE in zip(undone, each, strict=True):
            writer.add(text, features_LE)
            progress.update()
        if is_first:
            writer.wait_for_others(LAUNCHED_AT, config.patience_s, show)


def launched_as() -> tuple[int, int]:
    """(rank, world size) as a launcher says it in the environment; (0, 1) without one. Raises `ValueError` if they are no pair."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ValueError(
            f"the environment says RANK={rank} of WORLD_SIZE={world_size}; let a launcher set both, or unset them"
        )
    return int(rank), int(world_size)


def instructions_of(config: EmbedConfig) -> list[str]:
    """The distinct instructions of the caches and lines of the file, sorted. Raises `DataError` for a blank one."""
    from .cache import Cache
    from .language import distinct_texts

    texts = [text for cache in config.caches for text in Cache.open(cache).episodes["instruction"]]
    if config.texts is not None:
        if not config.texts.is_file():
            raise DataError(
                f"there is no file {config.texts}; give --texts one with an instruction a line, or leave it out"
            )
        lines = config.texts.read_text().splitlines()
        blank = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if blank is not None:
            raise DataError(f"line {blank} of {config.texts} is blank; every line must be an instruction")
        texts += lines
    return distinct_texts(texts)


def _build(config: EmbedConfig, texts: Sequence[str], *, show_progress: bool) -> "tuple[Tokenizer, TextEncoder | None]":
    from .compact_tokenizer import CompactTokenizer
    from .text_encoder import build_encoder, encoder_device
    from .tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.tokenizer, texts)
    if config.compact is not None:
        tokenizer = CompactTokenizer.for_prompts(tokenizer, config.compact, texts)
    encoder = build_encoder(
        config.encoder,
        config.tokenizer,
        tokenizer.vocab_size,
        dtype=config.dtype,
        device=encoder_device(config.device),
        layer_by_layer=config.layer_by_layer,
        show_progress=show_progress,
    )
    return tokenizer, encoder


def _check_equal(config: EmbedConfig, empty: "Language", texts: Sequence[str]) -> None:
    """Refuse what is at `config.out` unless it is the language that would be made; the device that made it does not count."""
    from .cache import unfinished_path
    from .language import Language
    from .language_writer import language_plan, plan_differences

    if not (config.out / "language.json").is_file():
        raise DataError(f"{config.out} is there already and is not a language; give another --out")
    there = Language.load(config.out)
    old, new = language_plan(there, there.table_texts), language_plan(empty, texts)
    for plan in (old, new):
        plan["identity"]["encoder"] = {k: v for k, v in (plan["identity"]["encoder"] or {}).items() if k != "device"}
    changes = plan_differences(old, new)
    if changes:
        raise DataError(
            f"the language {config.out} was made from something else ({changes}); delete it (rm -r {config.out}) or give another --out"
        )
    shutil.rmtree(unfinished_path(config.out), ignore_errors=True)  # a kill between renaming and cleaning up


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds its own argument; the rank is in the environment.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    config = tyro.cli(EmbedConfig, args=arguments, prog="vlatune embed")
    from .language import Language

    there = config.out.exists()
    embed(config)
    if launched_as()[0] > 0:
        return
    language = Language.load(config.out)
    lengths = language.num_tokens
    kept = "" if config.compact is None else f", {language.vocab_size} token rows kept"
    features = "no features" if language.embedding_width is None else f"{language.embedding_width} features a token"
    print(
        f"{'left as it is' if there else 'made'}: {config.out}: {len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, "
        f"{features}{kept}\n{language.known_texts[0]!r} reads {' '.join(map(repr, language.pieces(language.known_texts[0])))}"
    )


if __name__ == "__main__":
    try:
        main()
    except (DataError, ValueError) as error:
        print(f"vlatune embed: {error}", file=sys.stderr)
        raise SystemExit(2) from error
