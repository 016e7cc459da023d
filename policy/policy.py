"""Policy = backbone + expert + objective + normalisation."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch, Observation
from ..data.normalise import Normaliser, Statistics
from ..data.vector_layout import LaidOut
from .backbones import BACKBONES
from .backbones.siglip_t5 import SiglipT5Config
from .config import Embodiment, PolicyConfig
from .experts import EXPERTS
from .experts.dit import DiTExpertConfig
from .experts.expert import SplitExpert
from .objectives.consistency import sample_candidates
from .objectives.draws import DrawKeys
from .objectives.objective import Draw, Loss, Objective
from .prefix import Prefix


class Policy(nn.Module):
    """Observation in, action chunk out; single-device mathematics.

    A robot's numbers are normalised, then laid out in the model's vectors, whose widths S and A can be larger. A layout that
    encodes them reads raw units: there nothing is normalised."""

    weight_A: Tensor

    def __init__(self, config: PolicyConfig, embodiment: Embodiment, statistics: Statistics) -> None:
        super().__init__()
        self.config = config
        self.embodiment = embodiment
        self.statistics = statistics
        _check_image_tokens(config)
        image_px = config.backbone.image_px
        if image_px != embodiment.image_rule.size_px:
            raise ValueError(
                f"the vision tower reads {image_px}-pixel images, but those of the cache have {embodiment.image_rule.size_px}; "
                f"prepare with --image-px {image_px}"
            )
        self.state_normaliser = Normaliser(statistics.state, config.state_normalisation, config.near_constant)
        self.action_normaliser = Normaliser(statistics.actions, config.action_normalisation, config.near_constant)
        for layout in (config.state_layout, config.action_layout):
            if layout is not None:
                layout.check_robot(embodiment.robot)
        self.state_layout = LaidOut(config.state_layout, embodiment.state_dim)
        self.action_layout = LaidOut(config.action_layout, embodiment.action_dim)
        self.backbone = BACKBONES[type(config.backbone)](
            config.backbone,
            vocab_size=embodiment.vocab_size,
            encoder_width=embodiment.encoder_width,
            state_dim=self.state_layout.width,
            cameras=embodiment.cameras,
            reads=config.expert.reads,
        )
        self.expert = EXPERTS[type(config.expert)](
            config.expert,
            prefix=self.backbone.shape,
            horizon=config.horizon,
            action_dim=self.action_layout.width,
            second_level=config.objective.has_second_level,
        )
        self.register_buffer("weight_A", self._dimension_weights(), persistent=False)
        for parameter in (*self.backbone.unread_parameters(), *self.expert.unread_parameters()):
            parameter.requires_grad_(False)

    def _dimension_weights(self) -> Tensor:
        """(A,): what each entry of an action counts in the loss."""
        weight_A = torch.ones(self.action_layout.width)
        if self.config.gripper_weight == 1:
            return weight_A
        if self.embodiment.gripper_action is None:
            raise ValueError(
                f"policy.gripper_weight is {self.config.gripper_weight}, and nothing says which action is the gripper; leave it at 1"
            )
        slots = self.action_layout.slots_with(self.embodiment.gripper_action)
        return weight_A.index_fill_(0, slots, self.config.gripper_weight)

    def _used_entries(self) -> Tensor:
        """(A,) bool: what the robot has of the action's vector, and of the state's where both are one: RDT was pretrained with
        one mask for both, and reads a state outside it as one that was left out."""
        state_S, action_A = self.state_layout.mask_W, self.action_layout.mask_W
        return state_S | action_A if state_S.shape == action_A.shape else action_A

    @property
    def action_shape(self) -> tuple[int, int]:
        """(H, the robot's action dimensions): a chunk as the robot gets it."""
        return self.config.horizon, self.embodiment.action_dim

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(H, A): the noise that a chunk is made from."""
        return self.config.horizon, self.action_layout.width

    def prefix(self, observation: Observation) -> Prefix:
        """The observation, encoded once."""
        state_BTS = self.state_layout(self.state_normaliser(observation.state_BTS))
        prefix: Prefix = self.backbone(observation, state_BTS)
        batch = state_BTS.shape[0]
        action_mask_BA = self._used_entries().expand(batch, -1)
        control_hz_B = torch.full((batch,), self.embodiment.control_hz, device=state_BTS.device)
        if observation.hidden is not None:
            action_mask_BA = action_mask_BA & ~observation.hidden.action_mask_B[:, None]
            control_hz_B = control_hz_B.masked_fill(observation.hidden.control_hz_B, 0)
        return replace(prefix, state_BTS=state_BTS, action_mask_BA=action_mask_BA, control_hz_B=control_hz_B)

    def bind(self, observation: Observation) -> SplitExpert:
        """The expert, bound to the encoded observation; it can then be called for any noise."""
        bound: SplitExpert = self.expert.bind(self.prefix(observation))
        return bound

    def forward(self, batch: Batch, keys: DrawKeys, draw: Draw | None = None) -> Loss:
        """The objective's unreduced loss. A recorded `draw` replaces the one that `keys` name."""
        actions_BHA = self.action_layout(self.action_normaliser(batch.actions_BHA))
        config = self.config
        valid_BHA = (batch.valid_BH | config.train_padded_steps)[..., None] & (
            self.action_layout.mask_W | config.train_unused_dims
        )
        draw = config.objective.draw(actions_BHA, keys) if draw is None else draw
        loss = config.objective.loss(self.bind(batch.observation), actions_BHA, valid_BHA, draw)
        return replace(loss, weight_BHA=loss.weight_BHA * self.weight_A)

    def sample(self, observation: Observation, noise_BHA: Tensor, objective: Objective | None = None) -> Tensor:
        """A chunk of the robot's actions in raw units, float32. `noise_BHA` is standard normal, (B, *noise_shape). `objective` samples in
        place of the policy's own, for instance with another number of steps."""
        chunks_BKHW = self.chunks(observation, noise_BHA[:, None], objective or self.config.objective)
        actions_BHW: Tensor = self.action_normaliser.inverse(chunks_BKHW[:, 0])
        return actions_BHW

    def chunks(self, observation: Observation, noise_BKHA: Tensor, objective: Objective) -> Tensor:
        """(B, K, H, W) float32: for each of K noises a chunk of the robot's W actions, normalised; a row is encoded once for all of its K."""
        laid_out_BKHA = sample_candidates(objective, self.bind(observation), noise_BKHA)
        return self.action_layout.inverse(laid_out_BKHA).float()


def _check_image_tokens(config: PolicyConfig) -> None:
    """RDT learnt a position for each patch of each picture: raises ValueError where the images have others."""
    backbone, expert = config.backbone, config.expert
    if not isinstance(backbone, SiglipT5Config) or not isinstance(expert, DiTExpertConfig):
        return
    pictures = backbone.num_history * backbone.num_camera_slots
    patches = (backbone.image_px // backbone.vision.patch_px) ** 2
    if pictures * patches != expert.num_image_tokens:
        raise ValueError(
            f"policy.expert.num_image_tokens is {expert.num_image_tokens}: one learnt position for each patch of {pictures} pictures "
            f"(RDT-1B's are 729 a picture, of 384 pixels), and images of {backbone.image_px} pixels have {patches} patches; prepare with "
            "--image-px 384 and leave policy.backbone.vision as it is, or, without RDT-1B's weights, set it to "
            f"{pictures * patches}"
        )
