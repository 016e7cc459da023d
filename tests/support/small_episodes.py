"""A row of episodes.csv, as a sweep of pocket writes it."""

from dataclasses import replace

from vlatune.eval.results import EpisodeRow


def row(**changes) -> EpisodeRow:
    plain = EpisodeRow(
        run="demo",
        checkpoint="step_000400",
        step=400,
        weights_hash="abc",
        actor="policy",
        benchmark="pocket",
        suite="pocket",
        task_id=1,
        task="put_the_red_cube_on_the_plate",
        task_language="put the red cube on the plate",
        instruction="put the red cube on the plate",
        init_state=7,
        seed=0,
        split="selection",
        outcome="success",
        success=True,
        num_steps=61,
        steps_to_success=61,
        num_decisions=8,
        wall_s=2.5,
        sim_s=1.0,
        render_s=0.8,
        queue_ms=1.25,
        policy_ms_mean=20.5,
        policy_ms_p95=31.0,
        smoothness=0.1 + 0.2,
        action_saturation=0.0,
        failure_mode="",
        video="videos/a.mp4",
        protocol="pocket",
        max_steps=200,
        num_settle_steps=10,
        image_px=128,
        sampling='{"num_sampling_steps": 10, "solver": "euler"}',
        num_sampling_steps=10,
        num_executed_steps=8,
        horizon=16,
        batch_size=2,
        mujoco="3.3.2",
        robosuite="1.4.0",
        libero="0.1.4",
        torch="2.13.0",
        vlatune="0.1.0",
        renderer="osmesa",
        device="cpu",
        error="",
    )
    return replace(plain, **changes)
