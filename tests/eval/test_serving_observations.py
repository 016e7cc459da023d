"""What a server makes of an observation: the keys it may come under, how it is turned, and each refusal."""

import numpy as np
import pytest
from running_server import A, H, S, observation, reader

from vlatune.data.episodes import DataError
from vlatune.eval.serving.limits import API_KEY_VARIABLE, Limits, RequestRate, read_api_key, shows_key
from vlatune.eval.serving.messages import Refused
from vlatune.eval.serving.observations import ObservationReader

PICTURE = observation(3, px=6)["observation/agentview"]
WRIST = observation(4, px=6)["observation/eye_in_hand"]
STATE = np.arange(S) / 4


@pytest.mark.parametrize(
    "sent",
    [
        {"observation/agentview": PICTURE, "observation/eye_in_hand": WRIST, "observation/state": STATE},
        {"agentview": PICTURE, "eye_in_hand": WRIST, "state": STATE.astype(np.float32)},
        {"observation/image": PICTURE, "observation/wrist_image": WRIST, "observation/state": STATE},
        {"images": {"agentview": PICTURE, "eye_in_hand": WRIST, "other": 3}, "state": STATE[None]},
        {"agentview": PICTURE[None], "observation/front": WRIST, "state": STATE, "observation/joint_position": "x"},
        {"agentview": np.moveaxis(PICTURE, 2, 0), "eye_in_hand": np.moveaxis(WRIST, 2, 0), "state": STATE},
    ],
    ids=["names", "bare", "openpi", "aloha", "own", "colours first"],
)
def test_every_way_to_send_it(sent):
    request = reader(camera_keys={"eye_in_hand": "observation/front"} if "observation/front" in sent else {}).read(
        {**sent, "prompt": "go"}
    )
    np.testing.assert_array_equal(request.raw.images["agentview"], PICTURE[None])
    np.testing.assert_array_equal(request.raw.images["eye_in_hand"], WRIST[None])
    np.testing.assert_array_equal(request.raw.state_TS, STATE[None].astype(np.float32))
    assert request.raw.state_TS.dtype == np.float32
    assert (request.raw.instruction, request.previous_HA, request.inference_delay) == ("go", None, 0)


@pytest.mark.parametrize(
    ("orientation", "sent"), [("raw", PICTURE), ("rot180", PICTURE[::-1, ::-1]), ("flipud", PICTURE[::-1])]
)
def test_turned_back(orientation, sent):
    request = reader(orientation=orientation).read({**observation(), "observation/agentview": sent})
    np.testing.assert_array_equal(request.raw.images["agentview"], PICTURE[None])


def test_a_policy_that_looks_back():
    looks_back = reader(num_offsets=2)
    two = {key: np.stack([value, value]) for key, value in observation().items() if key != "prompt"}
    request = looks_back.read({**two, "prompt": "go", "there": np.array([False, True])})
    assert request.raw.images["agentview"].shape == (2, 16, 16, 3)
    assert request.raw.state_TS.shape == (2, S)
    assert request.raw.there_T is not None and request.raw.there_T.tolist() == [False, True]
    assert looks_back.read({**two, "prompt": "go"}).raw.there_T is None
    with pytest.raises(Refused, match=r"agentview is uint8 of shape \(16, 16, 3\); send \(2, rows, columns, 3\)"):
        looks_back.read(observation())
    with pytest.raises(Refused, match=r"there is bool of shape \(1,\); send \(2,\) truth values"):
        looks_back.read({**two, "prompt": "go", "there": np.array([True])})


def test_candidates_and_real_time_chunking():
    previous = np.ones((H, A))
    sent = {"previous_actions": previous, "num_executed_steps": np.int64(4), "inference_delay": 2}
    request = reader(reads_previous=True).read({**observation(), **sent})
    np.testing.assert_array_equal(request.previous_HA, previous.astype(np.float32))
    assert (request.num_executed_steps, request.inference_delay) == (4, 2)
    with pytest.raises(Refused, match="depend on the one before, and num_executed_steps is missing; send how many"):
        reader(reads_previous=True).read(observation())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"observation/agentview": PICTURE / 255},
            "float64 of shape .*; send pictures of numbers from 0 to 255 as uint8",
        ),
        ({"observation/agentview": "a picture"}, "observation/agentview is str 'a picture'; send pictures"),
        ({"observation/agentview": PICTURE[..., :2]}, r"\(6, 6, 2\); send \(rows, columns, 3\)"),
        ({"observation/agentview": PICTURE[:0]}, "is 0 x 6 pixels; send 1 to 9 a side"),
        ({"observation/agentview": np.zeros((10, 2, 3), np.uint8)}, "is 10 x 2 pixels; send 1 to 9 a side"),
        ({"agentview": PICTURE}, "agentview came 2 times, as observation/agentview and agentview; send it once"),
        ({"images": [PICTURE]}, "images is a list; send a map of cameras and pictures"),
        ({"observation/state": STATE[:7]}, r"state is float64 of shape \(7,\); send \(8,\) or \(1, 8\) numbers"),
        ({"observation/state": [0.0] * 8}, "observation/state is a list; send"),
        ({"observation/state": STATE * np.nan}, "numbers that are not finite, or too large for float32; send none"),
        ({"observation/state": STATE * 1e300}, "numbers that are not finite, or too large for float32; send none"),
        ({"prompt": " "}, "prompt is str ' '; send the instruction as a text"),
        ({"prompt": 3}, "prompt is int 3; send the instruction as a text"),
        ({"prompt": "go " * 20}, "prompt has 60 characters; send at most 30"),
        ({"previous_actions": np.ones((H, A + 1))}, r"\(10, 8\); send \(10, 7\) numbers"),
        ({"previous_actions": np.full((H, A), np.nan)}, "previous_actions has numbers that are not finite"),
        ({"num_executed_steps": 0}, "num_executed_steps is int 0; send a whole number from 1 to 10"),
        ({"num_executed_steps": True}, "num_executed_steps is bool True; send a whole number"),
        ({"inference_delay": 2.0}, "inference_delay is float 2.0; send a whole number from 0 to 10"),
        ({"previous_action": 1}, "unknown key 'previous_action'; it may have observation/agentview or agentview"),
    ],
)
def test_refusals(changes, sentence):
    with pytest.raises(Refused, match=sentence):
        reader(limits=Limits(picture_px=9, prompt_characters=30)).read({**observation(px=6), **changes})


@pytest.mark.parametrize("key", observation())
def test_what_is_missing(key):
    sent = observation()
    del sent[key]
    with pytest.raises(Refused, match=f"{key.removeprefix('observation/')} is missing; send"):
        reader().read(sent)


@pytest.mark.parametrize("message", [None, 3, [1], {1: 2}])
def test_no_map(message):
    with pytest.raises(Refused, match="send a map with text keys: observation/agentview or agentview"):
        reader().read(message)


def test_a_prompt_for_all():
    sent = observation()
    del sent["prompt"]
    assert reader(default_prompt="wipe the table").read(sent).raw.instruction == "wipe the table"
    assert reader(default_prompt="wipe the table").read(observation()).raw.instruction == observation()["prompt"]


def test_another_key_of_no_camera():
    with pytest.raises(ValueError, match=r"--camera front x: the policy has no camera 'front'; it has agentview, eye"):
        reader(camera_keys={"front": "x"})
    assert isinstance(reader(), ObservationReader)


def test_request_rate():
    now_s = 100.0
    rate = RequestRate(per_s=4, clock=lambda: now_s)

    def granted(asked: int) -> int:
        count = 0
        for _ in range(asked):
            try:
                rate.count()
            except Refused as refusal:
                assert "more than 4 requests a second" in str(refusal)
            else:
                count += 1
        return count

    assert granted(9) == 4  # a second's worth at once
    now_s += 0.5
    assert granted(9) == 2
    now_s += 60
    assert granted(9) == 4


@pytest.mark.parametrize(
    "name", ["clients", "waiting", "requests_per_s", "message_mb", "picture_px", "prompt_characters"]
)
def test_limits_that_let_nothing_in(name):
    with pytest.raises(ValueError, match=f"--limits.{name.replace('_', '-')} is 0; it must be more than 0"):
        Limits(**{name: 0})


def test_the_api_key(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv(API_KEY_VARIABLE, "from the environment")
    assert read_api_key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert read_api_key(tmp_path / "key") == "from a file"
    with pytest.raises(DataError, match="nothing cannot be read .*; write a key there, or leave it out"):
        read_api_key(tmp_path / "nothing")
    for text in ("", " \n", "two\nlines", "schlüssel"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(ValueError, match="key holds no key; write some letters and digits there"):
            read_api_key(tmp_path / "key")
    assert shows_key(None, None)
    assert shows_key("Api-Key abc", "abc")
    for header in (None, "", "abc", "Api-Key ab", "Bearer abc", "Api-Key \udcff"):
        assert not shows_key(header, "abc")
