"""Every engine computes what one process computes: same weights, same rates, same averages, on one rank or two."""

import pytest
import torch
from launched import rows, run, train, weights

STEPS = ("--num-steps", "5", "--batch-size", "8", "--ema.decay", "0.9", "--checkpoint-every", "5")
TIGHT_CLIP = ("--optimizer.gradient-clip-norm", "0.05")  # less than any gradient here: every step is clipped


@pytest.fixture(scope="module")
def reference(small_cache, tmp_path_factory):
    """One process without DeepSpeed; float32."""
    out = tmp_path_factory.mktemp("runs") / "one_process"
    train(small_cache.path, out, *STEPS, *TIGHT_CLIP, "--engine", "plain", num_ranks=1)
    return out


def assert_same_run(reference, out, *, averaged: bool = True) -> None:
    for name in ("model.safetensors", *(["ema.safetensors"] if averaged else [])):
        expected, found = weights(reference, 5, name), weights(out, 5, name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    before, after = weights(reference, 0), weights(reference, 5)
    assert max((after[key] - value).abs().max() for key, value in before.items()) > 1e-3  # it was no standstill
    for row, other in zip(rows(reference), rows(out), strict=True):
        assert float(row["learning_rate"]) == float(other["learning_rate"])
        for column in ("loss", "grad_norm"):
            assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-4)
    assert all(float(row["grad_norm"]) > 0.05 for row in rows(reference))


def test_the_average_is_an_average(reference):
    """Not the weights, and not what they began as; and the reader of checkpoints finds it."""
    from vlatune.policy.acting import load_policy

    key = "expert.action_out_proj.weight"
    values = [weights(reference, 0)[key], weights(reference, 5, "ema.safetensors")[key], weights(reference, 5)[key]]
    assert values[0].dist(values[1]) < values[0].dist(values[2])
    assert not values[0].equal(values[1])
    folder = reference / "checkpoints" / "step_000005"
    averaged = load_policy(folder, device="cpu", averaged=True)
    assert averaged.policy.state_dict()[key].equal(values[1])
    assert averaged.weights_hash != load_policy(folder, device="cpu").weights_hash


def test_two_ranks_of_zero2(small_cache, reference, tmp_path):
    train(small_cache.path, tmp_path / "run", *STEPS, *TIGHT_CLIP)
    assert_same_run(reference, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3", "plain", "zero2_offload"])
def test_two_ranks_of_the_other_engines(small_cache, reference, tmp_path, engine):
    without_average = ("--ema.decay", "0") if engine == "zero3" else ()
    train(small_cache.path, tmp_path / "run", *STEPS, *TIGHT_CLIP, "--engine", engine, *without_average)
    assert_same_run(reference, tmp_path / "run", averaged=engine != "zero3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "num_ranks", "accumulated"), [("plain", 1, "4"), ("zero2", 2, "4"), ("zero1", 2, "2")]
)
def test_accumulated_micro_batches_are_one_batch(small_cache, reference, tmp_path, engine, num_ranks, accumulated):
    settings = (*STEPS, *TIGHT_CLIP, "--engine", engine, "--num-accumulation-steps", accumulated)
    train(small_cache.path, tmp_path / "run", *settings, num_ranks=num_ranks)
    assert_same_run(reference, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "plain"])
def test_a_module_that_is_used_twice_gets_both_gradients(engine):
    """The class of bugs that some DeepSpeed versions had: the second use overwrote or doubled the first one's gradient."""
    assert run("module_used_twice", engine).count("agrees") == 2  # both ranks
