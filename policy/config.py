"""What a policy is made of, and what it is tied to; both are stored in every checkpoint and rebuild it without a recipe."""

from dataclasses import dataclass, field

from ..data.images import ImageRule
from ..data.normalise import NEAR_CONSTANT, NormaliserMode
from ..data.prompt import PromptStyle
from ..data.vector_layout import VectorLayout
from .backbones import BackboneConfig
from .backbones.paligemma import PaliGemmaConfig
from .experts import ExpertConfig
from .experts.gemma import GemmaExpertConfig
from .objectives import ObjectiveConfig
from .objectives.flow import Flow


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A policy: backbone, expert, objective and how numbers are normalised."""

    backbone: BackboneConfig = field(default_factory=PaliGemmaConfig)
    expert: ExpertConfig = field(default_factory=GemmaExpertConfig)
    objective: ObjectiveConfig = field(default_factory=Flow)
    horizon: int = 10
    """Steps of an action chunk."""
    prompt: PromptStyle = "instruction"
    """What is tokenised: the instruction as it is, ended by a line break, or π0.5's with the state in words."""
    state_normalisation: NormaliserMode = "quantile"
    """How proprioception is scaled: by mean and deviation, 1 % to 99 % quantiles onto [-1, 1], extremes onto [-1, 1], or not."""
    action_normalisation: NormaliserMode = "quantile"
    """The same for actions."""
    near_constant: float = NEAR_CONSTANT
    """A dimension with a smaller scale (raw units) is centred and not scaled; public checkpoints scale nearly everything."""
    state_layout: VectorLayout | None = None
    """Where the robot's state stands in a pretrained policy's wider vector; None: the vector is the robot's."""
    action_layout: VectorLayout | None = None
    """The same for actions."""
    train_unused_dims: bool = False
    """Whether the entries of a wider vector that the robot lacks count in the loss, as openpi's 32 and RDT's 128 do."""
    train_padded_steps: bool = False
    """Whether chunk steps beyond an episode's end, where the last action is repeated, count in the loss, as in openpi."""
    gripper_weight: float = 1.0
    """Of the gripper's action in the loss; 1 for all others."""
    observation_offsets: tuple[int, ...] = (0,)
    """Which observations a decision reads, in control steps relative to now."""

    def __post_init__(self) -> None:
        if self.gripper_weight <= 0:
            raise ValueError(f"policy.gripper_weight is {self.gripper_weight}; it must be more than 0")
        if len(self.observation_offsets) != self.backbone.num_observations:
            raise ValueError(
                f"policy.observation_offsets is {self.observation_offsets}, and the backbone {self.backbone.type!r} reads "
                f"{self.backbone.num_observations} observation a decision; give as many offsets"
            )
        for name, layout, mode in (
            ("state", self.state_layout, self.state_normalisation),
            ("action", self.action_layout, self.action_normalisation),
        ):
            if layout is not None and layout.encoding != "as_is" and mode != "identity":
                raise ValueError(
                    f"policy.{name}_layout {layout.name!r} encodes raw units ({layout.encoding}), and policy.{name}_normalisation is "
                    f"{mode!r}; set it to 'identity'"
                )
        if self.prompt == "pi05" and self.backbone.reads_embeddings:
            raise ValueError(
                "policy.prompt is 'pi05', which writes the state into the text, and the backbone reads cached text embeddings; "
                "a text that differs at every step cannot be cached: choose policy.prompt 'instruction'"
            )


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """The data side of a policy: fixed by the cache it was trained on."""

    robot: str
    state_dim: int
    action_dim: int
    control_hz: float
    """Actions a second."""
    gripper_action: int | None
    """Index of the gripper in the action; None where nobody says."""
    cameras: tuple[str, ...]
    image_rule: ImageRule
    """How a camera's picture is turned upright, padded and resized: the same in training and in acting."""
    vocab_size: int
    encoder_width: int | None
    """Width of the cached text embeddings; None where the cache holds none."""
