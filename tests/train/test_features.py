"""Features of a frozen tower in place of pictures: the same policy, the same training, and refused where they would be wrong."""

import shutil
from dataclasses import replace

import pytest
import torch
from launched import rows, weights
from preset_policies import CAMERAS, make_batch, make_policy

from vlatune.data.augment import AugmentConfig
from vlatune.data.cache import Cache
from vlatune.data.episodes import DataError
from vlatune.data.vision_features import FeatureStore
from vlatune.policy.checkpoints.folder import read_policy
from vlatune.policy.lora import LoraConfig
from vlatune.policy.objectives.draws import DrawKeys
from vlatune.train import features as features_command
from vlatune.train.config import Stage
from vlatune.train.features import FeaturesConfig, main, make_features
from vlatune.train.recipes import load_recipe
from vlatune.train.run import train

PRESETS = ("pi05", "smolvla", "rdt", "clip_flow", "clip_unet")


def with_features(policy, batch):
    """All cameras and offsets through the tower in one call, as the forward does it."""
    observation = batch.observation
    images = torch.stack(list(observation.images.values()))
    with torch.no_grad():
        found = policy.backbone.picture_features(images.flatten(0, 2)).unflatten(0, images.shape[:3])
    features = dict(zip(observation.images, found, strict=True))
    return replace(batch, observation=replace(observation, images={}, features=features))


def loss_and_gradients(policy, batch) -> list[torch.Tensor]:
    keys = DrawKeys(seed=3, step=0, sample_index_B=batch.sample_index_B)
    loss = policy(batch, keys)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    total = (loss.entries_BHA * loss.weight_BHA).sum()
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    return [loss.entries_BHA, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cameras", [CAMERAS, CAMERAS[1:]])
def test_a_policy_computes_the_same(preset, cameras):
    """Bit for bit where the tower sees the same batch; RDT's grey picture goes through it alone."""
    policy = make_policy(preset)
    policy.backbone.vision_tower.requires_grad_(False)
    batch = make_batch(policy.config)
    images = {camera: batch.observation.images[camera] for camera in cameras}
    batch = replace(batch, observation=replace(batch.observation, images=images))
    featured = with_features(policy, batch)
    pairs = zip(loss_and_gradients(policy, batch), loss_and_gradients(policy, featured), strict=True)
    exact = {} if preset == "rdt" else {"rtol": 0, "atol": 0}
    for one, other in pairs:
        torch.testing.assert_close(other, one, **exact)
    assert len(loss_and_gradients(policy, featured)) > 3
    changed = {camera: 1 + value for camera, value in featured.observation.features.items()}
    other = replace(featured, observation=replace(featured.observation, features=changed))
    assert not loss_and_gradients(policy, other)[0].equal(loss_and_gradients(policy, featured)[0])


def test_rdts_masked_pictures_are_grey_whatever_the_features():
    policy = make_policy("rdt")
    featured = with_features(policy, make_batch(policy.config))
    seen = featured.observation
    other = {c: torch.where(seen.image_mask[c][..., None, None], value, 7.0) for c, value in seen.features.items()}
    changed = replace(featured, observation=replace(seen, features=other))
    assert not all(other[camera].equal(seen.features[camera]) for camera in CAMERAS)
    for one, two in zip(loss_and_gradients(policy, featured), loss_and_gradients(policy, changed), strict=True):
        assert one.equal(two)


@pytest.fixture(scope="module")
def tiny(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pictures"
    return replace(load_recipe("tiny"), engine="plain", cache=small_cache.path, out=out, trained="vision_frozen")


@pytest.fixture(scope="module")
def on_pictures(tiny):
    train(tiny)
    return tiny


@pytest.fixture(scope="module")
def store(on_pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "features"
    return make_features(settings(on_pictures, out))


def settings(run, out, **changes) -> FeaturesConfig:
    checkpoint = run.out / "checkpoints" / "step_000000"
    return FeaturesConfig(cache=run.cache, out=out, checkpoint=checkpoint, device="cpu", precision="fp32", **changes)


@pytest.fixture
def on_features(tiny, store, tmp_path):
    return replace(tiny, vision_features=store, out=tmp_path / "run")


def test_the_command_prints_the_size_first_and_keeps_what_is_there(on_pictures, store, small_cache, tmp_path, capsys):
    policy, _, _ = read_policy(on_pictures.out / "checkpoints" / "step_000000")
    opened = FeatureStore.open(store, small_cache)
    images = torch.from_numpy(small_cache.images["agentview"].copy())
    with torch.no_grad():
        expected = policy.backbone.picture_features(images)
    found = torch.from_numpy(opened.rows["agentview"].copy()).view(torch.float32).unflatten(1, opened.shape)
    torch.testing.assert_close(found, expected)
    before = (store / "manifest.json").stat().st_mtime_ns
    checkpoint = str(on_pictures.out / "checkpoints" / "step_000000")
    arguments = [str(small_cache.path), "--out", str(store), "--checkpoint", checkpoint]
    main([*arguments, "--precision", "fp32", "--device", "cpu"])
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("39 frames x 2 cameras x 4 x 16 float32 = 2e-05 GB; free on that disk: ")
    assert last == f"left as it is: {store}; train with --vision-features {store}"
    assert (store / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"dtype was 'float32' and is now 'bfloat16'"):
        main([*arguments, "--precision", "bf16", "--device", "cpu"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        settings(on_pictures, store, batch_size=0)


def test_a_killed_command_goes_on_to_the_same_bytes(on_pictures, tmp_path, monkeypatch):
    straight = make_features(settings(on_pictures, tmp_path / "straight", batch_size=8))
    config = settings(on_pictures, tmp_path / "killed", batch_size=8)
    compute, frames_seen = features_command._features, []

    def killed(policy, cache, camera, frames, device):
        frames_seen.append(frames.start)
        if frames.start == 16 and camera == "eye_in_hand":
            raise KeyboardInterrupt
        return compute(policy, cache, camera, frames, device)

    monkeypatch.setattr(features_command, "_features", killed)
    with pytest.raises(KeyboardInterrupt):
        make_features(config)
    monkeypatch.undo()
    assert frames_seen == [0, 0, 0, 8, 8, 16, 16]
    make_features(config)
    for file in straight.iterdir():
        assert (config.out / file.name).read_bytes() == file.read_bytes()


def test_a_full_disk_is_refused_before_the_work(on_pictures, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features_command.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DataError, match=r"take 2e-05 GB and the disk of .* has 1e-06 GB free; give --out"):
        make_features(settings(on_pictures, tmp_path / "out"))
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("trained", ["vision_frozen", "expert"])
def test_training_is_the_same(on_pictures, on_features, tmp_path, monkeypatch, trained):
    """To rounding: the tower saw the pictures in other batches. Four steps, float32; 1e-5 on weights of about 0.1."""
    reference = on_pictures
    if trained == "expert":
        reference = replace(reference, trained="expert", out=tmp_path / "reference")
        train(reference)
    config = replace(on_features, trained=trained)
    with monkeypatch.context() as patched:
        patched.setattr("vlatune.policy.backbones.siglip.picture_features", lambda *_: pytest.fail("the tower was run"))
        train(config)
    for step in (0, 4):
        expected, found = weights(reference.out, step), weights(config.out, step)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    for row, other in zip(rows(reference.out), rows(config.out), strict=True):
        for column in ("loss", "validation_loss", "action_error"):
            if row[column]:
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-4)
    acting, _, _ = read_policy(config.out / "checkpoints" / "step_000004")  # it acts on pictures: its tower is whole
    assert acting.backbone.vision_tower.state_dict().keys() == read_tower(reference).keys()


def read_tower(run):
    return read_policy(run.out / "checkpoints" / "step_000000")[0].backbone.vision_tower.state_dict()


def test_augmentation_is_refused(tiny, store):
    with pytest.raises(ValueError, match="which augmentation would change at every step"):
        replace(tiny, vision_features=store, augment=AugmentConfig(crop=0.9))


def test_a_trained_tower_is_refused_in_any_stage(on_features):
    with pytest.raises(ValueError, match=r"stage 1 of the run trains it \(trained 'full'\)"):
        train(replace(on_features, trained="full"))
    adapters = Stage(num_steps=2, trained="lora+expert", lora=LoraConfig(backbone="all", rank=2))
    with pytest.raises(ValueError, match=r"stage 2 of the run trains it \(trained 'lora\+expert'\)"):
        train(replace(on_features, then=(adapters,)))
    assert not on_features.out.exists()


def test_another_tower_is_refused(on_features):
    with pytest.raises(DataError, match=r"made by another vision tower than this run's \(other weights\)"):
        train(replace(on_features, seed=1))
    with pytest.raises(DataError, match=r"are float32, and this run's vision tower has bfloat16 weights"):
        train(replace(on_features, precision="bf16", engine="zero1"))
    assert not on_features.out.exists()


def test_a_resumed_run_asks_again(on_features, on_pictures, tmp_path):
    """The weights of a run that goes on are in its checkpoints; what is frozen lies in an earlier one."""
    first_weights = (str(on_pictures.out / "checkpoints" / "step_000000"),)
    config = replace(on_features, trained="expert", seed=1, pretrained=first_weights)  # other than its seed's
    train(replace(config, stop_at_step=2))
    train(config)
    assert (config.out / "checkpoints" / "step_000004").exists()
    other = replace(on_features, trained="expert", vision_features=None, seed=1, out=tmp_path / "other", stop_at_step=2)
    train(other)
    (other.out / "config.json").unlink()  # or the other field would be named first
    with pytest.raises(DataError, match=r"other weights"):
        train(replace(other, vision_features=config.vision_features, stop_at_step=None))


def test_another_cache_is_refused(on_features, small_cache, tmp_path):
    other = shutil.copytree(small_cache.path, tmp_path / "cache")
    manifest = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest.replace('"format_version"', ' "format_version"'))
    assert Cache.open(other).digest != small_cache.digest
    with pytest.raises(DataError, match="made from another cache"):
        train(replace(on_features, cache=other))


def test_each_cache_of_a_mixture_has_its_own(on_features, small_cache, tmp_path):
    with pytest.raises(ValueError, match="vision features for 1 of 2 caches"):
        train(replace(on_features, more_caches=(small_cache.path,)))
    with pytest.raises(ValueError, match="vision_features is not; give the first cache's"):
        replace(on_features, vision_features=None, more_vision_features=(on_features.vision_features,))
    mixed = {"more_caches": (small_cache.path,), "num_steps": 1}
    train(replace(on_features, more_vision_features=(on_features.vision_features,), **mixed))
    train(replace(on_features, vision_features=None, out=tmp_path / "pictures", **mixed))
    one, other = rows(on_features.out), rows(tmp_path / "pictures")
    assert float(one[0]["loss"]) == pytest.approx(float(other[0]["loss"]), rel=1e-4)


def test_pictures_of_another_size_are_refused(on_pictures, small_cache, tmp_path, monkeypatch):
    rule = replace(small_cache.image_rule, size_px=32)
    monkeypatch.setattr(Cache, "image_rule", property(lambda _cache: rule))
    with pytest.raises(DataError, match="reads 16-pixel images, and those of .* have 32; prepare with --image-px 16"):
        make_features(settings(on_pictures, tmp_path / "out"))
