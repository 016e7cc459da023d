"""Checkpoints on the hub, which here is a folder behind the three calls that are used of it; the real one is not asked."""

import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from launched import rows, weights

from vlatune.data.episodes import DataError
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.layout import complete_checkpoints
from vlatune.train import run as training
from vlatune.train.hub import ALONGSIDE, HubConfig, HubPush
from vlatune.train.loop import Interruption
from vlatune.train.recipes import load_recipe
from vlatune.train.tracking import WANDB_FILE


class FolderHub:
    """`HfApi.upload_folder` commits in parts; here every part is a file, and a call may fail between two of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: list[tuple[str, bool]] = []
        self.log: list[str] = []
        self.num_failures = 0
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.folder.mkdir(exist_ok=True)
        self.created.append((repo_id, private))

    def list_repo_files(self, repo_id):
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, allow_patterns=None, ignore_patterns=None, delete_patterns=None
    ):
        self.log.append(commit_message)
        self.has_begun.set()
        files = sorted(str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
        files = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert self.may_go_on.wait(500)  # between listing the files and reading them
        for number, name in enumerate(files):
            if self.num_failures and number == len(files) // 2:
                self.num_failures -= 1
                raise ConnectionError("Connection reset by peer.\nand much more")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / name)
        if delete_patterns:
            for name in set(filter_repo_objects(self.list_repo_files(repo_id), allow_patterns=delete_patterns)) - {
                *files
            }:
                (self.folder / name).unlink()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(training, "HubPush", partial(HubPush, api=hub))
    return hub


@pytest.fixture
def tiny(small_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Interruption, "__init__", lambda self: setattr(self, "asked", False))  # no signal handlers
    return replace(
        load_recipe("tiny"),
        engine="plain",
        cache=small_cache.path,
        out=tmp_path / "run",
        hub=HubConfig(repo_id="me/tiny"),
    )


def steps_with_state(folder: Path) -> list[int]:
    return [step for step, path in complete_checkpoints(folder).items() if any(path.glob("trainer/*"))]


def test_another_machine_goes_on_from_what_was_pushed(tiny, hub, tmp_path, capsys):
    straight = replace(tiny, out=tmp_path / "straight", hub=HubConfig())
    training.train(straight)
    training.train(replace(tiny, stop_at_step=2))
    assert hub.created == [("me/tiny", True)]
    assert "all is pushed to me/tiny; to fetch it: hf download me/tiny --local-dir" in capsys.readouterr().err
    assert list(complete_checkpoints(hub.folder)) == [0, 2]
    assert steps_with_state(hub.folder) == [2]
    assert hub.log == ["step 0", "step 0 is complete", "step 2", "step 2 is complete"]
    assert not (tiny.out / ".hub").exists()

    fetched = tmp_path / "elsewhere"
    shutil.copytree(hub.folder, fetched)
    shutil.rmtree(tiny.out)
    training.train(replace(tiny, out=fetched))
    found = weights(fetched)
    assert all(value.equal(found[name]) for name, value in weights(straight.out).items())
    assert [row["loss"] for row in rows(fetched)] == [row["loss"] for row in rows(straight.out)]
    assert steps_with_state(hub.folder) == [4] and [row["step"] for row in rows(hub.folder)] == ["1", "2", "3", "4"]
    assert load_policy(hub.folder / "checkpoints" / "step_000004", device="cpu").weights_hash


def test_training_does_not_wait_and_pruning_breaks_no_upload(tiny, hub, capsys):
    """The hub stands still until the run is at its end: by then the first checkpoint's state has long been pruned."""
    hub.may_go_on.clear()
    end_training = training.Tracker.close

    def go_on_at_the_end(tracker):
        assert hub.has_begun.wait(60)
        assert steps_with_state(tiny.out) == [6] and hub.log == ["step 0"]
        end_training(tracker)
        hub.may_go_on.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Tracker, "close", go_on_at_the_end)
        training.train(replace(tiny, num_steps=6))
    assert "waiting until step 6 has been pushed to me/tiny" in capsys.readouterr().err
    assert list(complete_checkpoints(hub.folder)) == [0, 2, 4, 6]
    assert steps_with_state(hub.folder) == [6]
    state = next((tiny.out / "checkpoints" / "step_000006" / "trainer").glob("*model*"))
    assert (hub.folder / state.relative_to(tiny.out)).read_bytes() == state.read_bytes()


def test_a_failure_is_said_once_and_made_good(tiny, hub, capsys):
    hub.num_failures = 2
    training.train(tiny)
    said = capsys.readouterr().err
    assert said.count("could not be pushed to me/tiny (Connection reset by peer)") == 1
    assert "step 0 could not be pushed" in said and "all is pushed" in said
    assert list(complete_checkpoints(hub.folder)) == [0, 2, 4]
    assert steps_with_state(hub.folder) == [4]


def test_what_could_not_be_pushed_is_pushed_by_the_next_start(tiny, hub, capsys):
    hub.num_failures = 100
    training.train(replace(tiny, hub=replace(tiny.hub, trainer_state=False)))
    said = capsys.readouterr().err
    assert "not pushed to me/tiny: step 0, 2, 4 (Connection reset by peer); the same command does it again" in said
    assert list(complete_checkpoints(hub.folder)) == []
    hub.num_failures = 0
    training.train(replace(tiny, hub=replace(tiny.hub, trainer_state=False)))
    assert list(complete_checkpoints(hub.folder)) == [0, 2, 4]
    assert steps_with_state(hub.folder) == []


def test_a_run_that_is_further_on_the_hub_is_not_overwritten(tiny, hub):
    training.train(tiny)
    shutil.rmtree(tiny.out)
    with pytest.raises(
        DataError, match=r"me/tiny on the hub has a checkpoint of step 4, which .*run has not: fetch it"
    ):
        training.train(tiny)
    assert not tiny.out.exists()


@pytest.mark.parametrize(
    ("repo_id", "reason"), [("not a name!", "Repo id must use alphanumeric"), ("me/tiny", "Cannot reach|offline mode")]
)
def test_a_hub_that_cannot_be_used_is_said_before_training(tiny, repo_id, reason, monkeypatch):
    """By the real client: a name that no repository can have, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=rf"nothing can be pushed to '{repo_id}' on the hub \(.*({reason}).*hf auth login"
    ):
        training.train(replace(tiny, hub=HubConfig(repo_id=repo_id)))
    assert not tiny.out.exists()


def test_a_file_system_without_hard_links_is_said(tiny, hub, monkeypatch):
    def refuse(*_arguments):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(DataError, match="a file system without hard links.*--hub.repo-id out"):
        training.train(tiny)


def test_the_wandb_run_goes_along():
    assert WANDB_FILE in ALONGSIDE
