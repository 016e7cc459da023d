"""Policy = backbone + expert + objective + normalisation."""

from torch import Tensor, nn

from ..data.batch import Batch, Observation
from ..data.normalise import Normaliser, Statistics
from .backbones import BACKBONES
from .config import Embodiment, PolicyConfig
from .experts import EXPERTS
from .experts.bound_expert import BoundExpert
from .objectives.draws import DrawKeys
from .objectives.objective import Draw, Loss


class Policy(nn.Module):
    """Observation in, action chunk out; single-device mathematics."""

    def __init__(self, config: PolicyConfig, embodiment: Embodiment, statistics: Statistics) -> None:
        super().__init__()
        self.config = config
        self.embodiment = embodiment
        self.statistics = statistics
        image_px = config.backbone.vision.image_px
        if image_px != embodiment.image_rule.size_px:
            raise ValueError(
                f"the vision tower reads {image_px}-pixel images, but those of the cache have {embodiment.image_rule.size_px}; "
                f"prepare with --image-px {image_px}"
            )
        if config.backbone.kv_shape != config.expert.kv_shape:
            raise ValueError(
                f"the backbone writes keys and values of (layers, heads, head_dim) {config.backbone.kv_shape}, the expert reads "
                f"{config.expert.kv_shape}; give policy.expert.gemma the depth, num_kv_heads and head_dim of policy.backbone.text"
            )
        self.backbone = BACKBONES[type(config.backbone)](
            config.backbone,
            vocab_size=embodiment.vocab_size,
            encoder_width=embodiment.encoder_width,
            state_dim=embodiment.state_dim,
            cameras=embodiment.cameras,
        )
        self.expert = EXPERTS[type(config.expert)](config.expert, action_dim=embodiment.action_dim)
        self.state_normaliser = Normaliser(statistics.state, config.state_normalisation)
        self.action_normaliser = Normaliser(statistics.actions, config.action_normalisation)
        for parameter in self.backbone.unread_parameters():
            parameter.requires_grad_(False)

    @property
    def action_shape(self) -> tuple[int, int]:
        """(H, A)."""
        return self.config.horizon, self.embodiment.action_dim

    def bind(self, observation: Observation) -> BoundExpert:
        """Encode the observation once; the bound expert can then be called for any noise."""
        bound: BoundExpert = self.expert.bind(self.backbone(observation, self.state_normaliser(observation.state_BTS)))
        return bound

    def forward(self, batch: Batch, keys: DrawKeys, draw: Draw | None = None) -> Loss:
        """The objective's unreduced loss. A recorded `draw` replaces the one that `keys` name."""
        actions_BHA = self.action_normaliser(batch.actions_BHA)
        valid_BHA = batch.valid_BH[..., None].expand_as(actions_BHA)
        draw = self.config.objective.draw(actions_BHA, keys) if draw is None else draw
        return self.config.objective.loss(self.bind(batch.observation), actions_BHA, valid_BHA, draw)

    def sample(self, observation: Observation, noise_BHA: Tensor) -> Tensor:
        """A chunk of actions in raw units, (B, H, A) float32. `noise_BHA` is standard normal."""
        normalised_BHA = self.config.objective.sample(self.bind(observation), noise_BHA)
        actions_BHA: Tensor = self.action_normaliser.inverse(normalised_BHA)
        return actions_BHA
