"""`vlatune check`: what is missing is named, with what to type."""

import ast
import http.server
import importlib.metadata
import importlib.util
import re
import shutil
import threading
from pathlib import Path

import pytest

from vlatune.eval.benchmarks import renderer
from vlatune.launch import check
from vlatune.launch.check import CheckConfig, Finding

ROOT = Path(__file__).parents[2]


def test_package_missing_or_of_another_version():
    assert check.check_package("no-such-package", {}) == Finding(
        what="no-such-package", status="missing", found="not installed", mend="bash launch/install.sh"
    )
    version = importlib.metadata.version("numpy")
    assert check.check_package("numpy", {"numpy": version}).status == "ok"
    other = check.check_package("numpy", {"numpy": "1.0"})
    assert (other.status, other.found, other.mend) == (
        "note",
        f"{version}, measured with 1.0",
        "bash launch/install.sh",
    )


def test_local_versions_are_the_same_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert check.check_package("torch", {"torch": "2.13.0"}).status == "ok"


def test_everything_required_is_pinned():
    """What setup.py asks for has one measured version; DeepSpeed's own figures and LIBERO's hang on them."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(values["extras_require"])
    required = [*ast.literal_eval(values["install_requires"]), *extras["sim"], *extras["dev"]]
    names = {re.split(r"[<>=\[;]", requirement)[0].lower() for requirement in required}
    assert sorted(names - set(check.pinned_versions())) == []


def test_no_compiler(monkeypatch):
    assert check.check_compiler().status == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = check.check_compiler()
    assert (finding.status, finding.found, finding.mend) == ("missing", "no g++", "sudo apt-get install -y g++")


def test_no_renderer(monkeypatch):
    def refuse() -> str:
        raise renderer.RendererError("no renderer: type this")

    monkeypatch.setattr(renderer, "choose_renderer", refuse)
    assert check.check_renderer() == Finding(
        what="renderer", status="missing", found="none", mend="no renderer: type this"
    )


def test_renderer_that_fails(monkeypatch):
    monkeypatch.setattr(renderer, "choose_renderer", lambda: "egl")
    monkeypatch.setattr(check, "RENDER", "raise RuntimeError('no display')")
    finding = check.check_renderer()
    assert finding.status == "missing"
    assert finding.found == "MUJOCO_GL=egl fails: RuntimeError: no display"
    assert finding.mend == "export MUJOCO_GL=osmesa"


@pytest.mark.sim
def test_renderer_renders():
    assert check.check_renderer().status == "ok"


def test_blank_picture_is_no_renderer(monkeypatch):
    monkeypatch.setattr(renderer, "choose_renderer", lambda: "osmesa")
    blank = "import types; image = __import__('numpy').zeros((48, 64, 3))\n" + check.RENDER.strip().splitlines()[-1]
    monkeypatch.setattr(check, "RENDER", blank)
    assert "the rendered sphere is a flat image" in check.check_renderer().found


def test_no_ffmpeg(monkeypatch):
    import imageio_ffmpeg

    def refuse() -> str:
        raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg.")

    assert check.check_ffmpeg().status == "ok"
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_version", refuse)
    finding = check.check_ffmpeg()
    assert (finding.status, finding.mend) == ("missing", "sudo apt-get install -y ffmpeg")


def test_libero_assets(monkeypatch, tmp_path):
    monkeypatch.setenv("VLATUNE_LIBERO_ASSETS", str(tmp_path))
    wrong = check.check_libero_assets()
    assert (wrong.status, wrong.found) == ("missing", f"{tmp_path} has no `scenes` folder")
    (tmp_path / "scenes").mkdir()
    assert check.check_libero_assets() == Finding(what="LIBERO assets", status="ok", found=str(tmp_path.resolve()))
    monkeypatch.delenv("VLATUNE_LIBERO_ASSETS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # LIBERO itself is not there either
    none = check.check_libero_assets()
    assert (none.status, "export VLATUNE_LIBERO_ASSETS=" in none.mend) == ("note", True)


def test_gpu_that_torch_does_not_see(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = check.check_accelerator()
    assert (finding.status, finding.mend) == ("note", "VLATUNE_TORCH=cuda bash launch/install.sh")


def test_hub_is_never_needed(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert check.check_hub().status == "note"
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    assert check.check_hub().status == "note"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check.check_hub().mend == "unset HF_HUB_OFFLINE"


def test_hub_that_answers(monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert check.check_hub().status == "ok"
        server.shutdown()


def test_exit_code_counts_only_what_is_needed(monkeypatch, capsys):
    note = Finding(what="Hugging Face hub", status="note", found="off")
    monkeypatch.setattr(check, "findings", lambda config: iter([note]))
    check.main([])
    assert "Everything that vlatune needs is here." in capsys.readouterr().out
    missing = Finding(what="mujoco", status="missing", found="not installed", mend="bash launch/install.sh")
    monkeypatch.setattr(check, "findings", lambda config: iter([note, missing]))
    with pytest.raises(SystemExit, match="1"):
        check.main([])
    out = capsys.readouterr().out
    assert "missing  mujoco            not installed  →  bash launch/install.sh" in out
    assert "1 needed thing(s) missing" in out


def test_table_has_every_package_once():
    names = [finding.what for finding in check.findings(CheckConfig(render=False, hub=False))]
    assert names[1 : 1 + len(check.PACKAGES)] == list(check.PACKAGES)
    assert len(names) == len(set(names))
    assert {"Python", "accelerator", "compiler", "ffmpeg", "LIBERO assets"} <= set(names)
