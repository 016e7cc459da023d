"""A user comes with a public checkpoint: it is fine-tuned here on two DeepSpeed ranks, converted back, and acts."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from launched import free_port
from safetensors.torch import load_file
from small_demonstrations import write_demos

from vlatune.data.batch import RawObservation
from vlatune.data.prepare import PrepareConfig, prepare
from vlatune.policy.acting import load_policy
from vlatune.policy.checkpoints.public import read_public

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SCRIPT = """
    import sys
    from dataclasses import replace
    from pathlib import Path

    from vlatune.policy.checkpoints.public import read_public
    from vlatune.train.recipes import load_recipe
    from vlatune.train.run import train

    checkpoint, cache, out = map(Path, sys.argv[-3:])
    policy = read_public(checkpoint).config
    policy = replace(policy, horizon=4, state_normalisation="quantile", action_normalisation="mean_std")
    train(replace(load_recipe("tiny"), cache=cache, out=out, policy=policy, pretrained=(str(checkpoint),), num_steps=2))
"""


@pytest.mark.timeout(1800)  # beside other work some have taken minutes
@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla"])
def test_fine_tuned_and_back(name, tmp_path):
    px = read_public(GOLDEN / name).config.backbone.image_px
    for task, seed in (("pick_up_the_red_cube", 1), ("pick_up_the_blue_cube", 2)):
        write_demos(tmp_path / "demos" / f"{task}_demo.hdf5", (7, 5, 9), seed=seed)
    cache = prepare(
        PrepareConfig(
            demos=tmp_path / "demos", out=tmp_path / "cache", image_px=px, encoder="none", resize="torch_bilinear"
        )
    )
    run = tmp_path / "run"
    script = tmp_path / "fine_tune.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", free_port()]
    finished = subprocess.run(
        [*command, script, GOLDEN / name, cache, run],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{GOLDEN / name}: " in finished.stdout
    assert "random weights" not in finished.stdout

    first, last = (
        load_file(run / "checkpoints" / step / "model.safetensors") for step in ("step_000000", "step_000002")
    )
    reference = read_public(GOLDEN / name).weights
    assert all(torch.equal(first[weight], tensor) for weight, tensor in reference.items())
    moved = {weight for weight, tensor in last.items() if not torch.equal(tensor, first[weight])}
    assert any(weight.startswith("expert.") for weight in moved)
    assert any(weight.startswith("backbone.vision_tower") for weight in moved)
    # What nobody reads is kept as it was.
    depth = 1 + max(
        int(weight.split(".")[3]) for weight in last if weight.startswith("backbone.language_model.layers.")
    )
    assert f"backbone.language_model.layers.{depth - 1}.mlp.up_proj.weight" not in moved

    acting = load_policy(run / "checkpoints" / "step_000002", device="cpu")
    random = np.random.default_rng(0)
    observation = RawObservation(
        images={camera: random.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8) for camera in acting.cameras},
        state_TS=random.normal(size=(1, 8)).astype(np.float32),
        instruction="pick up the red cube",
    )
    actions = acting.act(observation)
    assert actions.shape == (4, 7)
    assert np.isfinite(actions).all()
