"""A language beside the cache: made, left as it is, refused, killed and continued, by one process or several."""

import errno
import filecmp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_text_models import write_gemma_model, write_t5

from vlatune.data import embed as embed_module
from vlatune.data.cache import Cache, unfinished_path
from vlatune.data.embed import EmbedConfig, embed, main
from vlatune.data.episodes import DataError
from vlatune.data.language import Language
from vlatune.data.text_encoder import PretrainedT5

MORE = ("open the drawer", "push the blue cube", "wipe the table", "close the drawer", "lift the red cube")


@pytest.fixture(scope="module")
def t5(tmp_path_factory, small_cache) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"), [*small_cache.language.known_texts, *MORE])


@pytest.fixture
def config(small_cache, t5, tmp_path) -> Callable[..., EmbedConfig]:
    """Of the small cache's two instructions and five more, with the tiny T5."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(MORE) + "\n")

    def make(out: str = "language", **changes: object) -> EmbedConfig:
        settings = {"tokenizer": str(t5), "encoder": str(t5), "texts": texts, **changes}
        return EmbedConfig(caches=(small_cache.path,), out=tmp_path / out, **settings)  # type: ignore[arg-type]

    return make


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other).as_posix() for p in other.rglob("*") if p.is_file())
    assert "language.json" in names
    _, differing, unreadable = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not differing + unreadable  # named where it fails
    return True


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


class Killed(Exception):
    pass


def killed_after(num_texts: int) -> Callable[..., Iterator[torch.Tensor]]:
    """Instead of `PretrainedT5.encode_each`: gives out some texts' features, then nothing any more."""
    whole = PretrainedT5.encode_each

    def encode_each(self: PretrainedT5, texts: list[list[int]]) -> Iterator[torch.Tensor]:
        for number, features in enumerate(whole(self, texts)):
            if number == num_texts:
                raise Killed
            yield features

    return encode_each


def test_a_language_of_the_caches_instructions_and_more(config, small_cache, t5):
    before = {file: file.stat().st_mtime_ns for file in small_cache.path.rglob("*")}
    made = embed(config())
    language = Language.load(made)
    texts = sorted({*small_cache.language.known_texts, *MORE})
    assert language.known_texts == tuple(texts)
    whole = Language.build(texts, tokenizer=str(t5), encoder=str(t5))
    assert language.identity == whole.identity
    one, other = language.prompts(texts, embeddings=True), whole.prompts(texts, embeddings=True)
    assert torch.equal(one.ids_BL, other.ids_BL)
    assert torch.equal(one.embedding_BLE, other.embedding_BLE)
    assert {file: file.stat().st_mtime_ns for file in small_cache.path.rglob("*")} == before
    assert not unfinished_path(made).exists()
    language.check_covers(
        small_cache.episodes["instruction"], prompt="instruction", folder=made, cache=small_cache.path
    )


def test_a_cache_is_read_with_another_language(config, small_cache):
    from vlatune.data.loader import ChunkLoader, LoaderConfig

    cache = Cache.open(small_cache.path, embed(config()))
    loader = ChunkLoader(cache, LoaderConfig(batch_size=3, horizon=2, cameras=("agentview",), embeddings=True))
    assert loader.batch(0).observation.prompts.embedding_BLE.shape[-1] == 16


def test_one_block_at_a_time_gives_the_same_bytes(config):
    assert same_bytes(embed(config()), embed(config("layers", layer_by_layer=True)))


def test_an_equal_one_is_left_and_a_different_one_refused(config, tmp_path):
    made = embed(config())
    before = (made / "language.json").stat().st_mtime_ns
    unfinished_path(made).mkdir()  # a kill between renaming and cleaning up
    assert embed(config()) == made
    assert (made / "language.json").stat().st_mtime_ns == before
    assert not unfinished_path(made).exists()
    for change, said in (
        ({"dtype": "float32"}, r"encoder\.dtype was 'bfloat16' and is now 'float32'"),
        ({"texts": None}, "gone: close the drawer, lift the red cube, open the drawer and 2 more"),
        ({"encoder": "none"}, r"encoder\.name was .* and is now None"),
        ({"tokenizer": "trained", "encoder": "none"}, r"tokenizer\.kind was 'pretrained' and is now 'trained'"),
    ):
        with pytest.raises(DataError, match=f"was made from something else .*{said}.* delete it .* or give another"):
            embed(config(**change))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="elsewhere is there already and is not a language; give another --out"):
        embed(config("elsewhere"))


def test_a_damaged_language_is_not_left_as_it_is(config):
    made = embed(config())
    table = made / "table.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"table\.safetensors was altered"):
        embed(config())


def test_a_killed_one_continues_with_the_texts_that_are_undone(config, monkeypatch):
    whole = embed(config("whole"))
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedT5, "encode_each", killed_after(3))
        with pytest.raises(Killed):
            embed(config())
    work = unfinished_path(config().out)
    assert not config().out.exists()
    assert len(list((work / "texts").iterdir())) == 3
    with pytest.raises(DataError, match="was begun from something else .*dtype was 'bfloat16' and is now 'float32'"):
        embed(config(dtype="float32"))

    encoded = []
    each = PretrainedT5.encode_each
    monkeypatch.setattr(PretrainedT5, "encode_each", lambda self, texts: encoded.extend(texts) or each(self, texts))
    assert same_bytes(embed(config()), whole)
    assert len(encoded) == 5  # of seven instructions and the empty text
    assert not work.exists()


def test_killed_while_finishing_it_continues(config, monkeypatch):
    whole = embed(config("whole"))
    save = Language.save

    def half_saved(self: Language, folder: Path) -> None:
        save(self, folder)
        (folder / "language.json").unlink()
        (folder / "language.json.tmp123").write_text("half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Language, "save", half_saved)
        with pytest.raises(Killed):
            embed(config())
    assert not config().out.exists()
    assert same_bytes(embed(config()), whole)


def test_a_damaged_text_of_an_unfinished_one_is_named(config, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedT5, "encode_each", killed_after(3))
        with pytest.raises(Killed):
            embed(config())
    file = next((unfinished_path(config().out) / "texts").iterdir())
    file.write_bytes(b"1234567890")
    with pytest.raises(DataError, match=f"{file.name} is damaged .*delete it and start the same command again"):
        embed(config())


def test_a_full_disk_leaves_nothing_half_written(config, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("vlatune.data.language_writer.write_whole", full)
        with pytest.raises(DataError, match="the disk of .* is full; free some space and run the same command again"):
            embed(config())
    assert not config().out.exists()
    assert Language.load(embed(config())).known_texts


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_one_after_another_give_the_same_bytes(config, monkeypatch, world_size):
    whole = embed(config("whole"))
    encoded = []
    each = PretrainedT5.encode_each
    monkeypatch.setattr(
        PretrainedT5, "encode_each", lambda self, texts: encoded.append(len(texts)) or each(self, texts)
    )
    for rank in range(1, world_size):
        as_rank(monkeypatch, rank, world_size)
        embed(config())
        assert not config().out.exists()
    as_rank(monkeypatch, 0, world_size)
    assert same_bytes(embed(config()), whole)
    assert sum(encoded) == 8  # more ranks than texts: some have nothing to do
    as_rank(monkeypatch, 1, world_size)  # and one that comes late finds it done
    embed(config())
    assert not unfinished_path(config().out).exists()


def test_a_killed_one_continues_on_another_number_of_ranks(config, monkeypatch):
    whole = embed(config("whole"))
    as_rank(monkeypatch, 1, 2)
    embed(config())
    as_rank(monkeypatch, 0, 1)
    assert same_bytes(embed(config()), whole)


def test_rank_0_waits_for_the_others(config, monkeypatch):
    whole = embed(config("whole"))
    rank = threading.local()
    monkeypatch.setattr(embed_module, "launched_as", lambda: (getattr(rank, "number", 0), 2))

    def other() -> None:
        rank.number = 1
        time.sleep(0.5)
        embed(config())

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert same_bytes(embed(config()), whole)
    finally:
        thread.join()


@pytest.mark.parametrize("dies", ["before rank 0 looks", "while rank 0 waits"])
def test_a_rank_that_died_is_named(config, monkeypatch, dies):
    rank = threading.local()
    monkeypatch.setattr(embed_module, "launched_as", lambda: (getattr(rank, "number", 0), 2))
    each = PretrainedT5.encode_each
    at_work = threading.Event()

    def encode_each(self: PretrainedT5, texts: list[list[int]]) -> Iterator[torch.Tensor]:
        if getattr(rank, "number", 0) == 0:
            yield from each(self, texts)
            return
        at_work.set()
        yield next(each(self, texts))
        time.sleep(1 if dies == "while rank 0 waits" else 0)
        raise Killed

    monkeypatch.setattr(PretrainedT5, "encode_each", encode_each)

    def other() -> None:
        rank.number = 1
        with pytest.raises(Killed):
            embed(config())

    thread = threading.Thread(target=other)
    thread.start()
    at_work.wait() if dies == "while rank 0 waits" else thread.join()
    try:
        with pytest.raises(DataError, match="rank 1 of 2 ended and left 3 texts undone, the first is .* it continues"):
            embed(config(patience_s=30))
    finally:
        thread.join()


def test_a_rank_that_was_killed_in_an_earlier_launch_is_waited_for(config, monkeypatch):
    whole = embed(config("whole"))
    as_rank(monkeypatch, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(PretrainedT5, "encode_each", killed_after(1))
        with pytest.raises(Killed):
            embed(config())
    monkeypatch.setattr(embed_module, "LAUNCHED_AT", time.time() + 1)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(DataError, match="3 texts are undone and for 0 s no rank has done any"):
        embed(config(patience_s=0.3))
    as_rank(monkeypatch, 0, 1)
    assert same_bytes(embed(config()), whole)


def test_a_rank_that_never_comes(config, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(DataError, match="4 texts are undone and for 0 s no rank has done any; .*--patience-s"):
        embed(config(patience_s=0.3))


def test_two_processes_for_the_same_rank(config, monkeypatch):
    from vlatune.data.language_writer import LanguageWriter

    monkeypatch.setattr("vlatune.data.language_writer.LOCK_TRIES", 2)
    plan = {"identity": {}, "texts": []}
    with (
        LanguageWriter(config().out, plan),
        pytest.raises(DataError, match="another process is embedding into .*; wait for it"),
    ):
        LanguageWriter(config().out, plan)


def test_ids_alone_and_a_compact_table(config, small_cache, tmp_path, capsys):
    model = write_gemma_model(tmp_path / "paligemma_tokenizer.model", small_cache.language.known_texts)
    arguments = [str(small_cache.path), "--tokenizer", str(model), "--encoder", "none"]
    main([*arguments, "--out", str(tmp_path / "ids")])
    said = capsys.readouterr().out
    assert "made: " in said
    assert "2 texts of " in said
    assert "'pick up the blue cube' reads '<s>' 'pick'" in said
    assert Language.load(tmp_path / "ids").embedding_width is None
    main([*arguments, "--out", str(tmp_path / "compact"), "--compact", "pi05"])
    compact = Language.load(tmp_path / "compact")
    assert f"{compact.vocab_size} token rows kept" in capsys.readouterr().out
    assert compact.kept_ids is not None
    main([*arguments, "--out", str(tmp_path / "compact"), "--compact", "pi05"])
    assert "left as it is" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"tokenizer\.kept_ids was '.* ids, sha256 .*' and is now"):
        main([*arguments, "--out", str(tmp_path / "compact"), "--compact", "newline"])


def test_several_caches_and_the_launchers_own_argument(config, small_cache, tmp_path):
    out = tmp_path / "out"
    main(
        ["--local_rank=0", str(small_cache.path), str(small_cache.path), "--out", str(out)]
        + ["--tokenizer", "trained", "--encoder", "seeded-t5"]
    )
    language = Language.load(out)
    assert language.known_texts == small_cache.language.known_texts
    assert language.identity == small_cache.language.identity


def test_wrong_settings_and_bad_input(config, small_cache, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no cache was given"):
        EmbedConfig(caches=(), out=tmp_path, tokenizer="trained", encoder="none")
    with pytest.raises(ValueError, match="--compact is for policies that look token ids up.*give --encoder none"):
        config(compact="pi05")
    with pytest.raises(ValueError, match="--layer-by-layer is for a public T5, and the encoder is 'none'"):
        config(encoder="none", layer_by_layer=True)
    with pytest.raises(ValueError, match="patience_s is 0"):
        config(patience_s=0)
    with pytest.raises(DataError, match="nowhere: it is not a cache"):
        embed(EmbedConfig(caches=(tmp_path / "nowhere",), out=tmp_path / "x", tokenizer="trained", encoder="none"))
    with pytest.raises(DataError, match="there is no file .*nothing.txt"):
        embed(config(texts=tmp_path / "nothing.txt"))
    (tmp_path / "blank.txt").write_text("open the drawer\n \n")
    with pytest.raises(DataError, match="line 2 of .*blank.txt is blank; every line must be an instruction"):
        embed(config(texts=tmp_path / "blank.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer .*empty' can be loaded"):
        embed(config(tokenizer=str(tmp_path / "empty"), encoder="none"))
    with pytest.raises(DataError, match="reads its own tokens, not those of tokenizer 'trained'"):
        embed(config(tokenizer="trained"))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2 of WORLD_SIZE=2"):
        embed(config())
    assert not config().out.exists()
    assert not unfinished_path(config().out).exists()


def started(config: EmbedConfig, **environment: str) -> "subprocess.Popen[bytes]":
    arguments = [str(config.caches[0]), "--out", str(config.out), "--tokenizer", config.tokenizer]
    arguments += ["--encoder", config.encoder, "--texts", str(config.texts)]
    return subprocess.Popen(
        [sys.executable, "-m", "vlatune.data.embed", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def in_a_process_of_its_own(config: EmbedConfig) -> Path:
    """What other tests left in this one, threads and flags of torch, must not make a difference of the last bit."""
    process = started(config)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    return config.out


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_same_bytes(config):
    whole = in_a_process_of_its_own(config("whole"))
    only = started(config(), RANK="1", WORLD_SIZE="2")
    texts = unfinished_path(config().out) / "texts"
    while not texts.is_dir() or not any(texts.iterdir()):
        assert only.poll() is None, only.communicate()
        time.sleep(0.02)
    only.send_signal(signal.SIGKILL)
    only.communicate()
    assert not config().out.exists()
    ranks = [started(config(), RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
    assert same_bytes(config().out, whole)
    assert not unfinished_path(config().out).exists()


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_it(config, t5, small_cache):
    whole = in_a_process_of_its_own(config("whole"))
    arguments = [str(small_cache.path), "--out", str(config().out), "--tokenizer", str(t5), "--encoder", str(t5)]
    finished = subprocess.run(
        ["deepspeed", "--num_accelerators", "2", "--module", "vlatune.data.embed", *arguments]
        + ["--texts", str(config().texts)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert same_bytes(config().out, whole)
