"""Which OpenGL is chosen, and what is said where there is none."""

import os

import pytest

from vlatune.eval.benchmarks import renderer
from vlatune.eval.benchmarks.renderer import RendererError, choose_renderer


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def pretend(monkeypatch, *, libraries: tuple[str, ...], gpu: bool) -> None:
    monkeypatch.setattr(renderer, "_find", lambda name: f"lib{name}.so" if name in libraries else None)
    monkeypatch.setattr(renderer, "GPU_DEVICE", renderer.Path("/dev/null" if gpu else "/nowhere/at/all"))


@pytest.mark.parametrize(
    ("libraries", "gpu", "chosen"),
    [
        (("EGL", "OSMesa"), True, "egl"),
        (("EGL", "OSMesa"), False, "osmesa"),
        (("OSMesa",), True, "osmesa"),
        (("EGL",), False, "egl"),
    ],
)
def test_egl_beside_a_gpu_or_alone_and_osmesa_otherwise(monkeypatch, libraries, gpu, chosen):
    pretend(monkeypatch, libraries=libraries, gpu=gpu)
    assert choose_renderer() == chosen
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == chosen


def test_what_the_user_set_stands(monkeypatch):
    pretend(monkeypatch, libraries=("EGL", "OSMesa"), gpu=True)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose_renderer() == "osmesa"


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        ("", "apt-get install -y libosmesa6"),
        ("osmesa", "apt-get install -y libosmesa6"),
        ("egl", "libegl1"),
        ("vulkan", "egl, osmesa"),
    ],
)
def test_no_renderer_is_one_sentence_with_the_mend(monkeypatch, wanted, advice):
    pretend(monkeypatch, libraries=(), gpu=False)
    monkeypatch.setenv("MUJOCO_GL", wanted)
    with pytest.raises(RendererError, match=advice) as raised:
        choose_renderer()
    assert "\n" not in str(raised.value)
