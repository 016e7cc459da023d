"""`vlatune inspect` on a clean cache and on caches with one planted fault each. Episodes are made here, in memory."""

import csv
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlatune.data.cache import Cache
from vlatune.data.episodes import DataError, Episode
from vlatune.data.images import ImageRule
from vlatune.data.inspection.concerns import CHECKS, concerns, look, not_checked
from vlatune.data.inspection.contact_sheet import choose_episodes, turned
from vlatune.data.inspection.page import InspectConfig, inspect, main
from vlatune.data.inspection.survey import is_blank
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.data.robots.libero_panda import LIBERO_PANDA, LIBERO_PANDA_JOINTS

TASKS = {"pick_up_the_cup": "pick up the cup", "open_the_drawer": "open the drawer"}
LENGTH = 24


def episode(task: str, number: int) -> Episode:
    """Moves all the time, closes its gripper half-way; the fingers follow within three frames."""
    random = np.random.default_rng((sorted(TASKS).index(task), number))
    asked_N = np.where(np.arange(LENGTH) < LENGTH // 2, -1.0, 1.0)
    opening_N = np.interp(np.arange(LENGTH), [LENGTH // 2, LENGTH // 2 + 3], [0.04, 0.0])
    actions_NA = np.column_stack([random.uniform(-0.9, 0.9, (LENGTH, 6)), asked_N])
    state_NS = np.column_stack([random.normal(size=(LENGTH, 6)), opening_N, -opening_N])
    return Episode(
        key=f"{task}/{number}",
        suite="kitchen",
        task=task,
        instruction=TASKS[task],
        images={
            camera: [random.integers(0, 256, (LENGTH, 8, 8, 3), dtype=np.uint8)] for camera in LIBERO_PANDA.cameras
        },
        state_NS=state_NS.astype(np.float32),
        actions_NA=actions_NA.astype(np.float32),
    )


class InMemory:
    def __init__(self, episodes: list[Episode], robot=LIBERO_PANDA) -> None:
        self.robot = robot
        self._episodes = {e.key: e for e in episodes}

    def keys(self):
        return list(self._episodes)

    def read(self, key):
        return self._episodes[key]

    def fingerprint(self):
        return {}


def clean_episodes() -> list[Episode]:
    return [episode(task, number) for task in TASKS for number in range(5)]


def cache_of(folder: Path, episodes: list[Episode], robot=LIBERO_PANDA) -> Path:
    config = PrepareConfig(demos=folder, out=folder / "cache", image_px=8, encoder="none")
    return prepare(config, InMemory(episodes, robot))


MakeCache = Callable[..., Path]


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    """`make_cache(episodes)`: the path of a cache of them."""
    return partial(cache_of, tmp_path)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Path:
    """The page of a cache whose first episode hardly moves, whose third is short and whose second task has its gripper turned."""
    episodes = clean_episodes()
    still_NA = np.zeros((LENGTH, 7), np.float32)
    still_NA[:6, 0], still_NA[:, 6] = 0.5, -1
    episodes[0] = replace(episodes[0], actions_NA=still_NA)
    one_short(episodes)
    sign_turned(episodes)
    path = cache_of(tmp_path_factory.mktemp("seen"), episodes)
    return inspect(InspectConfig(cache=path, episodes_per_task=2, picture_px=20))


def warnings_of(cache: Path) -> dict[str, str]:
    """check -> sentence; a check that spoke twice has both, one a line."""
    sentences: dict[str, str] = {}
    for concern in concerns(look(Cache.open(cache), num_pairs=8)):
        sentences[concern.check] = "\n".join([*sentences.get(concern.check, "").splitlines(), concern.sentence])
    return sentences


def with_actions(changed: Episode, **columns: np.ndarray) -> Episode:
    actions_NA = changed.actions_NA.copy()
    for name, values in columns.items():
        actions_NA[:, LIBERO_PANDA.action_names.index(name)] = values
    return replace(changed, actions_NA=actions_NA)


def with_state(changed: Episode, **columns: np.ndarray) -> Episode:
    state_NS = changed.state_NS.copy()
    for name, values in columns.items():
        state_NS[:, LIBERO_PANDA.state_names.index(name)] = values
    return replace(changed, state_NS=state_NS)


def with_pictures(changed: Episode, change: Callable[[np.ndarray], np.ndarray]) -> Episode:
    """Of the camera in the hand."""
    return replace(changed, images={**changed.images, "eye_in_hand": [change(changed.pictures("eye_in_hand"))]})


def cut(changed: Episode, length: int) -> Episode:
    return replace(
        changed,
        images={camera: [changed.pictures(camera)[:length]] for camera in changed.images},
        state_NS=changed.state_NS[:length],
        actions_NA=changed.actions_NA[:length],
    )


def test_a_clean_cache_has_no_warning(make_cache):
    assert warnings_of(make_cache(clean_episodes())) == {}


def outside_limit(episodes):
    dx_N = episodes[3].actions_NA[:, 0].copy()
    dx_N[[2, 7]] = 1.5, -2.0
    episodes[3] = with_actions(episodes[3], dx=dx_N)


def frozen(episodes):
    episodes[4] = with_pictures(episodes[4], lambda pictures: np.repeat(pictures[:1], LENGTH, axis=0))


def frozen_for_most(episodes):
    episodes[4] = with_pictures(
        episodes[4], lambda pictures: np.concatenate([pictures[:6], np.repeat(pictures[5:6], LENGTH - 6, axis=0)])
    )


def black(episodes):
    def switched_off(pictures):
        return np.concatenate([pictures[: LENGTH // 2], np.zeros_like(pictures[LENGTH // 2 :])])

    episodes[0] = with_pictures(episodes[0], switched_off)


def sign_turned(episodes):
    for k in range(5, 10):
        episodes[k] = with_actions(episodes[k], gripper=-episodes[k].actions_NA[:, 6])


def other_range(episodes):
    for k, e in enumerate(episodes):
        episodes[k] = with_actions(e, gripper=(e.actions_NA[:, 6] + 1) / 2)


def duplicate(episodes):
    episodes[1] = replace(episodes[0], key=episodes[1].key)


def constant_action(episodes):
    for k, e in enumerate(episodes):
        episodes[k] = with_actions(e, drz=np.zeros(LENGTH))


def nearly_constant_state(episodes):
    for k, e in enumerate(episodes):
        episodes[k] = with_state(e, eef_z_m=np.linspace(0.5, 0.50005, LENGTH))


def one_short(episodes):
    episodes[2] = cut(episodes[2], 5)


def shared_instruction(episodes):
    for k, e in enumerate(episodes):
        episodes[k] = replace(e, instruction="do it")


def two_texts(episodes):
    episodes[0] = replace(episodes[0], instruction="take the cup")


FAULTS = [
    (
        outside_limit,
        "actions within the limit",
        r"^2 frames of 1 episode have actions outside -1 to 1 \(dx from -2 to 1\.5\)",
    ),
    (frozen, "cameras move", r"^camera eye_in_hand stands still in 1 episode .*\(pick_up_the_cup/4\)"),
    (frozen_for_most, "cameras move", r"^camera eye_in_hand stands still in 1 episode .*\(pick_up_the_cup/4\)"),
    (
        black,
        "cameras show something",
        r"^camera eye_in_hand shows one colour .* in 1 episode \(first in pick_up_the_cup/0, frame 12\)",
    ),
    (sign_turned, "gripper sign", r"^in task open_the_drawer the fingers close when .* asks them to open.*-1\.00"),
    (other_range, "gripper range", r"^the gripper's action runs from 0 to 1, .*-1 opens and 1 closes"),
    (duplicate, "no duplicates", r"^1 episode repeats another .*\(pick_up_the_cup/0 = pick_up_the_cup/1\)"),
    (constant_action, "no constant dimensions", r"^the action is constant in drz = 0: "),
    (nearly_constant_state, "no constant dimensions", r"hardly vary in state eef_z_m from 0\.5 to 0\.5"),
    (one_short, "lengths alike", r"^1 episode is more than 2\.5 times .*\(pick_up_the_cup/2: 5 frames, median 24\)"),
    (
        shared_instruction,
        "one task per instruction",
        r"^1 instruction stands for several tasks \('do it' for 2\): ",
    ),
    (
        two_texts,
        "one instruction per task",
        r"^1 task has several instructions \(pick_up_the_cup: '\w+ .*', '\w+ .*'\)",
    ),
]


@pytest.mark.parametrize(("plant", "check", "sentence"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_each_fault_gives_its_warning_and_no_other(make_cache, plant, check, sentence):
    episodes = clean_episodes()
    plant(episodes)
    found = warnings_of(make_cache(episodes))
    assert list(found) == [check]
    assert re.search(sentence, found[check]), found[check]


def test_every_check_has_a_planted_fault():
    assert {check for _, check, _ in FAULTS} == set(CHECKS)


def test_copies_on_both_sides_of_the_split_are_worse(make_cache):
    episodes = [replace(episode("pick_up_the_cup", 0), key=f"pick_up_the_cup/{k}") for k in range(4)]
    assert "1 of these stand in training and in validation" in warnings_of(make_cache(episodes))["no duplicates"]


def test_a_camera_may_stand_still_while_the_robot_does(make_cache):
    def still(changed):
        changed = with_pictures(changed, lambda pictures: np.repeat(pictures[:1], LENGTH, axis=0))
        return replace(changed, state_NS=np.repeat(changed.state_NS[:1], LENGTH, axis=0))

    assert "cameras move" not in warnings_of(make_cache([still(e) for e in clean_episodes()]))


def test_a_state_that_does_not_tell_the_fingers(make_cache):
    robot = replace(LIBERO_PANDA, state_names=tuple(f"number_{k}" for k in range(8)), state_parts=())
    episodes = clean_episodes()
    sign_turned(episodes)
    inspected = look(Cache.open(make_cache(episodes, robot)), num_pairs=8)
    assert concerns(inspected) == []
    assert not_checked(inspected) == {"gripper sign": "the state has no finger joints and no gripper_opening"}


def test_a_gripper_opening_counts_as_fingers(make_cache):
    def by_joints(changed):
        state_NS = np.concatenate(
            [changed.state_NS[:, :6], changed.state_NS[:, :1], changed.state_NS[:, 6:7] / 0.04], axis=1
        )
        return replace(changed, state_NS=state_NS)

    episodes = [by_joints(e) for e in clean_episodes()]
    assert "gripper sign" not in warnings_of(make_cache(episodes, LIBERO_PANDA_JOINTS))


def test_the_folder(seen):
    path = seen.parents[1] / "cache"
    assert seen == path.with_name("cache.inspect") / "index.html"
    assert {file.name for file in seen.parent.iterdir()} == {
        *("index.html", "tasks.csv", "warnings.csv", "orientation.png", "actions.png", "state.png", "over_time.png"),
        *("episodes_001_open_the_drawer.png", "episodes_002_pick_up_the_cup.png"),
    }
    with Image.open(seen.parent / "episodes_001_open_the_drawer.png") as sheet:
        assert sheet.size[0] == 6 * 20 + 4 * 4 + 22


def test_the_page_says_what_the_cache_is_and_needs_no_other_file(seen):
    path = seen.parents[1] / "cache"
    html = seen.read_text()
    for said in (str(path), Cache.open(path).digest, "kitchen", "libero_panda", "turned rot180, 8 px", "trained, "):
        assert said in html
    assert "4 of 10 episodes, 2 of 2 tasks" in html
    assert html.count("data:image/png;base64,") == 6
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', html) == ["warnings.csv", "tasks.csv"]
    assert re.findall(r'<li class="unwell">(.*?)</li>', html) == ["gripper sign", "lengths alike"]
    assert len(re.findall(r'<li class="well">', html)) == len(CHECKS) - 2
    for instruction, tokens in (("pick up the cup", 5), ("open the drawer", 4)):
        assert re.search(rf'<th>{instruction}</th><td class="number">{tokens}</td>', html)


def test_the_table_of_tasks(seen):
    table = pd.read_csv(seen.with_name("tasks.csv")).set_index("task")
    drawer, cup = table.loc["open_the_drawer"], table.loc["pick_up_the_cup"]
    assert (drawer.suite, drawer.instruction, drawer.frames) == ("kitchen", "open the drawer", 5 * LENGTH)
    assert (drawer.episodes, drawer.train, drawer.validation) == (5, 4, 1)
    assert (drawer.gripper_closed_share, drawer.idle_share) == (0.5, 0)
    assert (cup.frames, cup.length_min, cup.length_max) == (4 * LENGTH + 5, 5, LENGTH)
    assert cup.length_mean == (4 * LENGTH + 5) / 5
    assert cup.idle_share == pytest.approx((LENGTH - 6) / cup.frames)
    assert cup.gripper_closed_share == pytest.approx(3 * LENGTH / 2 / cup.frames)


def test_warnings_come_with_every_episode(seen):
    with seen.with_name("warnings.csv").open() as file:
        rows = {row["check"]: row["episodes"].split(";") for row in csv.DictReader(file)}
    assert rows == {
        "gripper sign": [f"open_the_drawer/{k}" for k in range(5)],
        "lengths alike": ["pick_up_the_cup/2"],
    }


def test_an_earlier_inspection_is_replaced_by_an_equal_one(seen, tmp_path, capsys):
    out = shutil.copytree(seen.parent, tmp_path / "again")
    (out / "index.html").write_text("an older page")
    (out / "episodes_009_gone.png").write_bytes(b"")
    options = ["--out", str(out), "--episodes-per-task", "2", "--picture-px", "20"]
    main([str(seen.parents[1] / "cache"), *options])
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (seen.parent, out)]
    assert contents[0] == contents[1]
    assert [folder.name for folder in tmp_path.iterdir()] == ["again"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:2]] == ["warning, gripper sign", "warning, lengths alike"]
    assert printed[2] == f"2 warnings; the page: {out}/index.html"


def test_another_folder_is_left_alone(seen, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(DataError, match=r"is there already and is not an inspection; give another --out"):
        inspect(InspectConfig(cache=seen.parents[1] / "cache", out=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_nan_is_damage(make_cache):
    path = make_cache(clean_episodes())
    numbers = np.memmap(path / "state.f32", np.float32, "r+", shape=(10 * LENGTH, 8))
    numbers[30, 2] = np.nan
    numbers.flush()
    with pytest.raises(DataError, match=r"pick_up_the_cup/1 has NaN or infinity .*`vlatune verify"):
        inspect(InspectConfig(cache=path))


def test_refusals(tmp_path):
    with pytest.raises(SystemExit, match="vlatune inspect: there is nothing at .*nowhere: it is not a cache"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="picture_px is 0; it must be at least 1"):
        InspectConfig(cache=tmp_path, picture_px=0)


@pytest.mark.parametrize(("per_task", "most", "expected"), [(2, 100, 6), (5, 7, 7), (3, 2, 2), (100, 100, 30)])
def test_how_many_episodes_are_shown(per_task, most, expected):
    episodes = pd.DataFrame({"suite": "s", "task": ["a"] * 10 + ["b"] * 10 + ["c"] * 10, "length": range(30)})
    chosen = choose_episodes(episodes, per_task, most)
    assert len(chosen) == len(set(chosen.index)) == expected
    per_task_shown = chosen.groupby("task").size()
    assert per_task_shown.max() - per_task_shown.min() <= 1
    if per_task == 2:
        assert list(chosen.index) == [0, 9, 10, 19, 20, 29]


def test_pictures_turned_another_way_are_those_of_another_cache():
    raw = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), dtype=np.uint8)
    for own in ("rot180", "flipud", "raw"):
        rule = ImageRule(orientation=own, size_px=6)
        for other in ("rot180", "flipud", "raw"):
            expected = ImageRule(orientation=other, size_px=6).prepare(raw)[0]
            np.testing.assert_array_equal(turned(rule.prepare(raw)[0], rule, other), expected)


def test_blank_pictures():
    grey = np.full((8, 8, 3), 128, np.uint8)
    padded = grey.copy()
    padded[:2] = 255
    assert is_blank(np.zeros((8, 8, 3), np.uint8), (0, 0, 0))
    assert is_blank(grey, (0, 0, 0))
    assert is_blank(padded, (255, 255, 255))
    assert not is_blank(padded, (0, 0, 0))
    seen = grey.copy()
    seen[4, 4] = 140
    assert not is_blank(seen, (0, 0, 0))
