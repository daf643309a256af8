"""Settings of `GCPOTrainer`: TRL's `GRPOConfig`, and for each stage of the method what it adds."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import MISSING, dataclass, field, fields

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from ..objective.divergence import DIVERGENCES, GRADIENTS, MATCHES
from ..objective.loss import DIVERGENCE_ON
from ..objective.selection import COMBINE, load
from ..objective.weighting import FORMS
from ..rollout import BACKENDS
from ..validation import check_count, check_device

ENTROPY_SOURCES = ("guided", "conditional")
SIMILARITY_SPACES = ("aligner", "codebook")
PARTLY_SCORED = ("skip", "partial")
WEIGHT_FORMS = (*FORMS, "stage")
DIVERGENCE_WEIGHTS = ("none", "stage")


@dataclass
class GCPOConfig(GRPOConfig):
    """Configuration of `GCPOTrainer`. Names start with the stage they belong to; the defaults are the released ones.

    With ``select_strategies=["everything"]`` and ``weight_form="none"`` training equals `GRPOTrainer`; on images, with
    several rewards that return None, also ``reward_missing="partial"``.
    """

    select_strategies: list[str] = field(
        default_factory=lambda: ["initial", "entropy_gradient", "similarity"],
        metadata={
            "help": "Which tokens are critical: names of files in gcpo_trl/objective/selection, or "
            "'package.module:attribute'. 'everything' trains on all tokens. Published: initial, entropy_gradient, "
            "similarity."
        },
    )
    select_fraction: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={
            "help": "Share of an image's or a text's tokens that each strategy keeps, in (0, 1]; of a text at least "
            "one token. One number for all strategies, or one each in their order. Published: 0.1."
        },
    )
    select_combine: str = field(
        default="disjoint",
        metadata={
            "help": "'disjoint': each strategy picks among what the ones before it left, so every image trains on "
            "exactly the same number of tokens (released code). 'union': strategies may overlap (paper, Eq. 6)."
        },
    )
    select_window: list[float] = field(
        default_factory=lambda: [0.1, 0.9],
        metadata={
            "help": "Part of the sequence in which entropy_gradient looks, as shares. Released code: 0.1 0.9; the "
            "paper does not restrict it (0 1)."
        },
    )
    select_smoothing: bool = field(
        default=True,
        metadata={"help": "Average the entropy map over earlier neighbours before its gradient is taken (Eq. 4)."},
    )
    select_complement: bool = field(
        default=False, metadata={"help": "Train on the tokens that were NOT selected: the paper's control experiment."}
    )
    select_entropy_from: str = field(
        default="guided",
        metadata={
            "help": "Distribution whose entropy counts for images: 'guided' is the one sampled from (released code), "
            "'conditional' the policy's own (paper, Eq. 1). The same when rollout_guidance_scale is 1."
        },
    )
    select_similarity_space: str = field(
        default="aligner",
        metadata={
            "help": "Embedding in which group similarity is measured: 'aligner' is what the language model reads "
            "(released for Janus), 'codebook' the codes of the image tokenizer (released for LlamaGen)."
        },
    )
    weight_form: str = field(
        default="exp",
        metadata={
            "help": "Dynamic advantage weight: 'exp' (released code, 1 at the start), 'linear' (the paper's Eq. 7 "
            "literally, 0 at the start) or 'none'. 'stage' is the baseline STAGE instead: tokens unlike those of the "
            "group's samples of opposite advantage weigh more, mean 1 over a sample; it needs no reference, and its "
            "authors measure in select_similarity_space='codebook'."
        },
    )
    weight_clip: float = field(
        default=0.5,
        metadata={
            "help": "Bound on |log p - log p_ref| in the weights 'exp' and 'linear', > 0. Published: 0.5 to 1; "
            "released code: 0.5."
        },
    )
    weight_detach: bool = field(
        default=True,
        metadata={
            "help": "Keep gradients out of the weight. False reproduces the released code, which also moves tokens "
            "that were not selected, and makes the image head and its gradient run over all tokens."
        },
    )
    divergence: str = field(
        default="k3",
        metadata={
            "help": "What beta multiplies: 'k3' is TRL's own KL, 'reverse_kl' the same number (released as rkl), "
            "'forward_kl' (fkl), 'jensen_shannon' (js), or 'alpha', a family between the first two. Published: "
            "k3 (GCPO); all three (f-divergence GRPO)."
        },
    )
    divergence_alpha: float = field(
        default=0.5,
        metadata={
            "help": "Member of divergence='alpha', in [0, 1]: 0 is reverse_kl, 1 forward_kl, 0.5 twice the squared "
            "Hellinger distance."
        },
    )
    divergence_match: str = field(
        default="curvature",
        metadata={
            "help": "'curvature' scales the divergence so that one beta holds the policy equally hard near the "
            "reference, whichever is chosen: jensen_shannon times 4, the others times 1. 'value' takes it as printed "
            "(released code)."
        },
    )
    divergence_gradient: str | None = field(
        default=None,
        metadata={
            "help": "'pathwise' differentiates the divergence at the sampled token (GRPO, the released code); "
            "'unbiased' adds what sampling depends on, g - w g'. Default: as use_bias_correction_kl says, which "
            "multiplies the divergence by the importance ratio and is then unbiased, and else is pathwise; 'pathwise' "
            "needs use_bias_correction_kl=False."
        },
    )
    divergence_on: str = field(
        default="critical",
        metadata={
            "help": "Tokens that the divergence is on: 'critical' (Eq. 8, released code) or 'all' the policy drew, "
            "over whose number it is then normalised, while the policy term stays with the critical ones. 'all' makes "
            "the image head and its gradient run over all tokens."
        },
    )
    divergence_weight: str = field(
        default="none",
        metadata={
            "help": "'stage' multiplies the divergence of each token by STAGE's weight in [0.5, 1], less for tokens "
            "unlike those of the group's samples of opposite advantage."
        },
    )
    reward_missing: str | None = field(
        default=None,
        metadata={
            "help": "A completion that one of several rewards could not score (None): 'skip' leaves it out, advantage "
            "zero; 'partial' adds up the rewards it has, as GRPOTrainer does, which suits rewards that are each for "
            "some rows of the dataset. Rewards of weight 0 do not count. Default: skip for images, partial for texts."
        },
    )
    rollout_guidance_scale: float = field(
        default=5.0,
        metadata={
            "help": "Classifier-free guidance u + s (c - u) while sampling images; 1 is no guidance. Log-probabilities "
            "stay conditional. Published: 5 for Janus-Pro."
        },
    )
    rollout_batch_size: int = field(
        default=0,
        metadata={
            "help": "Images sampled at once on a device; 0 means the whole generation batch. Does not change images."
        },
    )
    rollout_backend: str = field(
        default="auto",
        metadata={
            "help": "How images are sampled, not which: 'eager' is the fast path; 'graph' the same as CUDA graphs, "
            "whose caches of keys and values stay between rollouts; 'auto' takes graphs on CUDA where they can be "
            "captured and else 'eager'; 'reference' is transformers' forward at every token, slow, to compare with."
        },
    )
    rollout_overlap: bool = field(
        default=True,
        metadata={
            "help": "While images are drawn, decode those of the chunk before (rollout_batch_size images) and ask "
            "rewards for them: asynchronous ones, on CUDA all but torch modules, the others from a thread. A reward is "
            "then called once a chunk, with whole groups, and log_metric averages its calls. False: everything in "
            "turn, for a reward that talks to other ranks, or where memory is short."
        },
    )
    train_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of an image model that train: language_model, generation_head, generation_aligner, "
            "generation_embeddings. Default (published): language_model. With LoRA, the linear layers of these parts "
            "are adapted unless target_modules says otherwise. Text models train as in GRPOTrainer."
        },
    )
    reward_device: str = field(
        default="auto",
        metadata={
            "help": "Where the models of reward_funcs live: 'auto' is GCPO_REWARD_DEVICE where it is set, else each "
            "rank's GPU, else the CPU; 'cpu' or 'cuda:1' take those of all ranks away from training. They stay where "
            "they first load. A reward that is a torch.nn.Module is placed by TRL."
        },
    )
    log_images: int = field(
        default=0,
        metadata={
            "help": "Every how many optimizer steps a grid of generated images, with prompts, rewards and critical "
            "tokens, goes to output_dir/images and to the trackers in report_to (wandb, tensorboard, trackio); 0 is "
            "never."
        },
    )
    log_images_count: int = field(
        default=8,
        metadata={
            "help": "Images in such a grid, at most: as many whole groups as fit, or a part of one group that does not."
        },
    )
    log_images_size: int = field(
        default=256,
        metadata={
            "help": "Longest side in pixels to which images are shrunk before ranks exchange them. Images smaller than "
            "144 pixels are drawn enlarged, so that their labels fit."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False  # TRL's default is True, which stops a notebook without a GPU
        super().__post_init__()
        self._check_selection()
        self._check_choice("select_entropy_from", ENTROPY_SOURCES)
        self._check_choice("select_similarity_space", SIMILARITY_SPACES)
        self._check_choice("weight_form", WEIGHT_FORMS)
        self._check_divergence()
        if self.reward_missing is not None:
            self._check_choice("reward_missing", PARTLY_SCORED)
        self._check_choice("rollout_backend", BACKENDS)
        if not self.weight_clip > 0:
            raise ValueError(f"weight_clip={self.weight_clip} must be positive; the paper uses 0.5 to 1")
        if not (math.isfinite(self.rollout_guidance_scale) and self.rollout_guidance_scale >= 0):
            raise ValueError(
                f"rollout_guidance_scale={self.rollout_guidance_scale} must be a finite number >= 0; 1 switches "
                "guidance off"
            )
        if self.rollout_backend == "graph" and self.use_cpu:
            raise ValueError("rollout_backend='graph' needs a CUDA device and use_cpu=True; set it to 'auto'")
        if self.rollout_batch_size < 0:
            raise ValueError(f"rollout_batch_size={self.rollout_batch_size} must be >= 0; 0 samples all at once")
        check_device("reward_device", self.reward_device)
        check_count(
            "log_images", self.log_images, least=0, hint="write the steps between grids, such as 50, or 0 for none"
        )
        check_count("log_images_count", self.log_images_count, least=1, hint="write the images in a grid, such as 8")
        check_count("log_images_size", self.log_images_size, least=1, hint="write pixels, such as 256")
        if self.weight_form == "linear":
            warnings.warn(
                "weight_form='linear' is the paper's Eq. 7 literally: it is zero for every token while the policy "
                "equals the reference, so with weight_detach=True nothing ever moves. Use 'exp' to train.",
                stacklevel=3,
            )

    @classmethod
    def plain(cls, args: GRPOConfig) -> GCPOConfig:
        """The same settings under which every token trains, unweighted: what GRPOTrainer would do with ``args``."""
        config = copy.copy(args)
        config.__class__ = cls
        for setting in fields(cls):
            if setting.name not in GRPOConfig.__dataclass_fields__:
                default = setting.default if setting.default_factory is MISSING else setting.default_factory()
                setattr(config, setting.name, default)
        config.select_strategies, config.weight_form, config.reward_missing = ["everything"], "none", "partial"
        return config

    @property
    def needs_weight(self) -> bool:
        """Whether the dynamic advantage weight is on, and with it a reference model."""
        return self.weight_form in FORMS and self.weight_form != "none"

    @property
    def needs_opposing(self) -> bool:
        """Whether a weight of STAGE is on, and with it the similarity to samples of opposite advantage."""
        return "stage" in (self.weight_form, self.divergence_weight)

    @property
    def own_divergence(self) -> bool:
        """Whether the divergence is added beside TRL's loss; else TRL's own KL is used, to the bit."""
        chosen = (self.divergence, self.divergence_gradient, self.divergence_on, self.divergence_weight)
        return chosen != ("k3", None, "critical", "none")

    @property
    def selects_everything(self) -> bool:
        """Whether every token trains, as in GRPO."""
        return self.select_strategies == ["everything"] and not self.select_complement

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")

    def _check_divergence(self) -> None:
        self._check_choice("divergence", tuple(DIVERGENCES))
        self._check_choice("divergence_match", MATCHES)
        self._check_choice("divergence_on", DIVERGENCE_ON)
        self._check_choice("divergence_weight", DIVERGENCE_WEIGHTS)
        if self.divergence_gradient is not None:
            self._check_choice("divergence_gradient", GRADIENTS)
        if not 0 <= self.divergence_alpha <= 1:
            raise ValueError(
                f"divergence_alpha={self.divergence_alpha} must lie in [0, 1]; 0 is reverse_kl, 1 is forward_kl"
            )
        ours = {f.name: f.default for f in fields(self) if f.name.startswith("divergence")}
        changed = {name: value for name, default in ours.items() if (value := getattr(self, name)) != default}
        if self.beta == 0.0 and changed:
            seen = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            raise ValueError(f"{seen} has no effect at beta=0; set beta, such as 0.01, or leave it out")
        if "divergence_alpha" in changed and self.divergence != "alpha":
            raise ValueError(
                f"divergence_alpha={self.divergence_alpha} has no effect on divergence={self.divergence!r}; set "
                "divergence='alpha', or leave it out"
            )
        if self.divergence_gradient == "pathwise" and self.use_bias_correction_kl:
            raise ValueError(
                "divergence_gradient='pathwise' with use_bias_correction_kl=True, TRL's default, which multiplies the "
                "divergence by a ratio whose gradient makes it unbiased; set use_bias_correction_kl=False"
            )

    def _check_selection(self) -> None:
        self._check_choice("select_combine", COMBINE)
        if not self.select_strategies:
            raise ValueError("select_strategies is empty; name at least one, such as 'everything' for plain GRPO")
        if isinstance(self.select_strategies, str):
            raise ValueError(
                f"select_strategies={self.select_strategies!r} is not a list; write one, also for one name"
            )
        if len(set(self.select_strategies)) < len(self.select_strategies):
            raise ValueError(f"select_strategies={self.select_strategies} names one twice; name each once")
        for strategy in self.select_strategies:
            load(strategy)
        if self.select_complement and "everything" in self.select_strategies:
            raise ValueError(
                "select_complement=True with select_strategies=['everything'] trains on no token; name other "
                "strategies, or set select_complement=False"
            )
        self._check_fractions()
        if len(self.select_window) != 2 or not 0 <= self.select_window[0] < self.select_window[1] <= 1:
            raise ValueError(
                f"select_window={self.select_window} must be two shares 0 <= start < end <= 1, such as [0.1, 0.9]"
            )

    def _check_fractions(self) -> None:
        shares = self.select_fraction if isinstance(self.select_fraction, list) else [self.select_fraction]
        if len(shares) == 1:
            self.select_fraction = shares[0]
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"select_fraction={self.select_fraction} must lie in (0, 1]; the paper uses 0.1")
        count = len(self.select_strategies)
        if len(shares) not in (1, count):
            raise ValueError(
                f"select_fraction={shares} has {len(shares)} shares for {count} strategies "
                f"({', '.join(self.select_strategies)}); write one for all, or one each"
            )
        total = sum(shares) * (count if len(shares) == 1 else 1)
        if self.select_combine == "disjoint" and total > 1 + 1e-9:
            raise ValueError(
                f"select_fraction={self.select_fraction} for {count} strategies asks for {total:g} of all tokens; "
                f"lower it to at most {1 / count:.4g}, or set select_combine='union'"
            )

    def check_tokens(self, tokens: int) -> None:
        """Raise if a strategy keeps none of an image's ``tokens``."""
        shares = self.select_fraction if isinstance(self.select_fraction, list) else [self.select_fraction]
        if not self.selects_everything and math.floor(min(shares) * tokens + 1e-9) == 0:
            raise ValueError(
                f"select_fraction={self.select_fraction} keeps 0 of {tokens} tokens; raise it to at least "
                f"{1 / tokens:.4f}"
            )
