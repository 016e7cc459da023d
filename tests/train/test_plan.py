"""`vlatune plan`: bytes of every engine by hand, what follows from them, and that it works for every recipe."""

import io
from dataclasses import replace

import pandas as pd
import pytest

from vlatune.train.activation_memory import ActivationMemory
from vlatune.train.config import ActivationCheckpointingConfig, TrainConfig
from vlatune.train.ema import EmaConfig
from vlatune.train.engine_memory import engine_memory
from vlatune.train.plan import PlanConfig, engine_table, main, plan_stage
from vlatune.train.recipes import RECIPES, load_recipe

BUCKET = 200_000_000
EVERY_BLOCK = ActivationCheckpointingConfig(parts=("vision", "language_model", "expert"))
ENGINES = ["zero1", "zero2", "zero2_offload", "zero3", "plain"]


def tiny(**changes) -> TrainConfig:
    return replace(load_recipe("tiny"), **changes)


@pytest.fixture(scope="module")
def stages():
    """Of a recipe that trains the expert, then adapters as well."""
    config = load_recipe("tiny_stages")
    return [plan_stage(stage, config, PlanConfig(gpus=2)) for stage in config.stages]


def table(config, **settings) -> pd.DataFrame:
    """Of a policy of three billion parameters whose activations are given: with checkpointing a tenth."""

    def activations(is_plain, checkpointing):
        return ActivationMemory(fixed=1e9, per_sample=(0.2e9 if checkpointing.parts else 2e9) * (1 + is_plain))

    return engine_table(
        config,
        PlanConfig(**settings),
        sizes=[10**9] * 3,
        trained_sizes=[10**9] * 3,
        activations=activations,
        every_block=EVERY_BLOCK,
    ).set_index("engine")


def test_bytes_by_hand():
    """Four billion parameters in four tensors, half of them trained, on four GPUs; with an average."""
    sizes, trained = [10**9] * 4, [10**9] * 2
    config = tiny(ema=EmaConfig(decay=0.999))
    found = {engine: engine_memory(engine, config, 4, sizes, trained) for engine in ENGINES}
    gb = {
        engine: [round(value / 1e9, 3) for value in (m.weights, m.gradients, m.optimizer, m.average, m.cpu)]
        for engine, m in found.items()
    }
    assert gb == {
        # 2 bytes a parameter and 2 a gradient; a quarter of 12 for masters and moments, and of 4 for the average.
        "zero1": [8, 4, 6, 2, 0],
        # Gradients accumulate in float32, a quarter each.
        "zero2": [8, 2, 6, 2, 0],
        # On the CPU a quarter of 12 + 4 (gradients) + 2 (what goes back) + 4 (average), and room for the largest gradient.
        "zero2_offload": [8, 2, 0, 0, 9 + 2 + 2],
        "zero3": [2, 2, 6, 0, 0],
        # All in float32 on each GPU.
        "plain": [16, 8, 16, 8, 0],
    }
    assert found["zero2"].buffers == 2 * 2 * BUCKET
    # The owned slice of the largest gradient in float64; ZeRO-1 makes one piece of its gradients, then that in float32.
    assert found["zero2"].step == 8 * 0.5e9
    assert found["zero1"].step == 8 * 0.5e9 + (2 + 4) * 0.5e9
    assert found["plain"].buffers == 0  # gradients lie in DDP's buckets


def test_in_float32_all_weights_are_twice_as_large():
    half, whole = (
        engine_memory("zero2", tiny(precision=precision), 2, [10**9], [10**9]) for precision in ("auto", "fp32")
    )
    assert whole.weights == 2 * half.weights
    assert whole.optimizer == half.optimizer


def test_a_step_holds_buffers_and_activations_or_the_optimizers_own():
    memory = engine_memory("zero1", tiny(), 1, [10**9], [10**9])
    assert memory.total(0) == memory.kept + memory.step
    assert memory.total(1e12) == memory.kept + memory.buffers + 1e12
    line = ActivationMemory(fixed=1e9, per_sample=2e9)
    most = memory.largest_micro_batch(line, 80e9)
    assert memory.total(line.at(most)) <= 80e9 < memory.total(line.at(most + 1))
    assert memory.largest_micro_batch(line, memory.kept + memory.step - 1) == 0


def test_more_samples_need_more_memory_and_more_memory_takes_them():
    few, many = (table(tiny(batch_size=size)) for size in (8, 32))
    assert (many["activations"] > few["activations"]).all()
    assert (many["total"] >= few["total"]).all()
    assert (few["most_checkpointed"] >= few["most"]).all()
    assert (few["most"] == many["most"]).all()
    total = many.loc["zero2", "total"]
    for memory_gb, answer in ((total + 4.1, "yes"), (total + 3.9, "no")):
        row = table(tiny(batch_size=32), memory_gb=memory_gb, reserve_gb=4.0).loc["zero2"]
        assert row["fits"] == answer
        assert (row["most"] >= 32) == (answer == "yes")


def test_blocks_that_the_recipe_checkpoints_count_as_such():
    kept, checkpointed = table(tiny(batch_size=32)), table(tiny(batch_size=32, activation_checkpointing=EVERY_BLOCK))
    assert (checkpointed["activations"] < kept["activations"]).all()
    assert (checkpointed["most"] == kept["most"]).all()


def test_an_average_under_zero3_is_refused_as_training_refuses_it():
    assert table(tiny(ema=EmaConfig(decay=0.9))).loc["zero3", "fits"] == "refused: average"
    with pytest.raises(ValueError, match="not kept under ZeRO-3"):
        tiny(ema=EmaConfig(decay=0.9), engine="zero3")


def test_every_stage_is_planned_with_what_it_trains(stages):
    first, second = stages
    assert (set(first.table["objective"]), set(second.table["objective"])) == ({"flow"}, {"rs_imle"})
    assert first.parts["together"].adapters == 0 < second.parts["together"].adapters
    assert second.parts["together"].trained == second.parts["together"].adapters + second.parts["expert"].total
    assert list(first.table["engine"]) == ENGINES
    assert first.table.notna().all(axis=None)


def test_time_follows_from_operations_and_the_chip(stages):
    on_two = stages[0]
    assert on_two.samples_per_s(1) == pytest.approx(989e12 / on_two.flops.total)
    slow = replace(on_two, plan=PlanConfig(gpus=1, device="NVIDIA A100-SXM4-80GB"))
    assert slow.hours == pytest.approx(on_two.hours * 2 * 989 / 312)


def test_a_person_reads_tables(stages):
    text = stages[1].text
    assert text.startswith(
        "steps 2 to 4: lora+expert, rs_imle, on 2 x H100 of 80 GB; 4 samples a step, 2 a GPU and micro-batch, prompts of 24"
    )
    sizes = stages[1].parts["together"]
    assert f"together {sizes.total:,} {sizes.trained:,} {sizes.adapters:,}" in " ".join(text.split())
    assert all(f"\n{engine} " in text for engine in ENGINES)


@pytest.mark.filterwarnings("ignore::UserWarning:tyro")
def test_the_command_takes_settings_of_the_recipe_and_prints_csv(capsys):
    main(["tiny", "--csv", "--gpus", "2", "--memory-gb", "24", "--batch-size", "8", "--trained", "expert"])
    rows = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(rows["engine"]) == ENGINES
    assert set(rows["micro_batch"]) == {4}
    assert set(rows["trained"]) == {"expert"}
    assert set(rows["memory_gb"]) == {24}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus is 0; it must be more than 0"),
        ({"reserve_gb": -1.0}, "reserve_gb is -1.0; it must be 0 or more"),
        ({"device": "TPU v5"}, "nothing is known of the device 'TPU v5'; there are: A10, "),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**settings)


def test_a_batch_that_does_not_divide_is_refused():
    config = tiny()
    with pytest.raises(ValueError, match="--batch-size 4 does not divide into 3 ranks"):
        plan_stage(config.stages[0], config, PlanConfig(gpus=3))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe):
    config = load_recipe(recipe)
    for stage in config.stages:
        plan = plan_stage(stage, config, PlanConfig(gpus=4))
        assert (plan.engines["activations"] >= 0).all()
        assert (plan.engines["most_checkpointed"] > 0).any()
        assert plan.flops.total >= plan.flops.forward > 0
        assert plan.text
