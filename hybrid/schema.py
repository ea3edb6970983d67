"""The configuration's schema: every key with its type, its default and, where the name does not say it, its meaning.

``conf/`` holds the choices, ``hybrid.config`` the rules that values must obey.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class RWKVConfig:
    """The RWKV-6 branch (FLA's ``RWKV6Attention``)."""

    num_heads: int = 4
    expand_k: float = 0.5  # key_dim = d_model * expand_k, divisible by num_heads
    expand_v: float = 1.0  # value_dim = d_model * expand_v
    shift_low_rank: int = 32  # rank of the data-dependent token shift
    decay_low_rank: int = 64  # rank of the data-dependent decay


@dataclass
class MambaConfig:
    """The Mamba-2 branch (FLA's ``Mamba2``)."""

    state_size: int = 128  # N
    head_dim: int = 64  # P; heads = expand * d_model / head_dim
    expand: int = 2
    n_groups: int = 1  # groups that share B and C
    conv_kernel: int = 4


@dataclass
class AttentionConfig:
    """Causal attention with rotary positions, the control (block ``A``)."""

    num_heads: int = 4
    rope_base: float = 10000.0


@dataclass
class ModelConfig:
    name: str = MISSING
    pattern: str = "P*8"  # P parallel, R RWKV-6, M Mamba-2, A attention; "R M*21 R"
    branches: list[str] = field(default_factory=lambda: ["rwkv", "mamba"])  # the two of a P block
    d_model: int = 128
    vocab_size: int | None = None  # the tokenizer's; filled in from the data where it is not set
    ffn_mult: float = 4.0  # FFN width as a multiple of d_model ...
    ffn_hidden: int | None = None  # ... or the width itself ...
    target_params: Any = None  # ... or solved so that the model has this many parameters: 3500000, 3.5e6, "3.5M"
    dropout: float = 0.0
    # Of a P block's first and second branch: share of the sequences for which, in training, its output is zero.
    branch_dropout: list[float] = field(default_factory=lambda: [0.0, 0.0])
    norm_eps: float = 1e-5
    rwkv: RWKVConfig = field(default_factory=RWKVConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)


@dataclass
class FusionConfig:
    """Options of all fusions; ``conf/fusion/NAME.yaml`` lists those that NAME has, and only they can be set."""

    name: str = MISSING
    branch_norm: str = "none"  # none | rms: normalise each branch's output before the fusion (no parameters)
    gate_init: float | None = None  # gated, gated_channel: share of the first branch (RWKV-6) at step 0
    weight_init: float | None = None  # weighted: share of the first branch at step 0
    gain_init: list[float] | None = None  # gain: start of the two per-channel gains
    proj_init: str | None = None  # concat, residual: identity (plain average or sum at step 0) | random
    num_heads: int | None = None  # cross_attention
    head_dim: int | None = None  # cross_attention
    window: int | None = None  # cross_attention: how many positions back a query sees, itself included


@dataclass
class InitConfig:
    name: str = "official"  # official | fla
    stream: int | None = None  # another draw of the initial values under one seed (A/A checks)


@dataclass
class DataConfig:
    name: str = MISSING  # shakespeare | tinyshakespeare | stdlib | text
    path: str | None = None  # a text file, or a local copy of tinyshakespeare
    works: list[str] | None = None  # shakespeare: only these works, e.g. [hamlet, macbeth]
    val_fraction: float = 0.1  # the last part of the text is the validation split
    tokenizer: str = "char"  # char | bpe
    vocab_size: int = 10000  # bpe only
    seq_len: int = 1024
    cache_dir: str = "~/.cache/groundthink"


@dataclass
class OptimConfig:
    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off
    rwkv_lr_mult: float = 1.0
    mamba_lr_mult: float = 1.0
    fusion_lr_mult: float = 1.0


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1  # final learning rate as a share of the peak ...
    min_lr: float | None = None  # ... or as a number


@dataclass
class TrainerConfig:
    max_steps: int = 5000
    batch_size: int = 32  # sequences a micro-batch
    grad_accum: int = 4  # micro-batches a step
    eval_every: int = 100
    eval_batch_size: int = 32
    log_every: int = 10
    checkpoint_every: int = 1000
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto (bfloat16 autocast on CUDA, float32 on CPU) | float32 | bfloat16
    compile: bool | None = None  # torch.compile of the blocks; where it is not set: on CUDA
    cuda_graph: bool | None = None  # a whole training step as one CUDA graph; where it is not set: on CUDA
    cpu_threads: int | None = None  # PyTorch's own choice where it is not set; 1 is fastest for small models
    seeds_together: int | None = None  # runs of a sweep that train as one; where it is not set: 8 on CUDA, if small
    tensorboard: bool = False


@dataclass
class KernelsConfig:
    """Which code computes the two recurrences; ``auto`` takes the best one there is and records it.

    Mamba-2's short convolution goes with ``ssd``, RWKV-6's token shift with ``wkv6``.
    """

    wkv6: str = "auto"  # auto | torch | triton | fla | triton+fla
    ssd: str = "auto"  # auto | torch | triton | mamba_ssm | triton+mamba_ssm


@dataclass
class OverfittingRule:
    """The validation loss is above its best while the training loss falls."""

    enabled: bool = True
    rise: float = 0.1  # share of the best validation loss


@dataclass
class PlateauRule:
    """No improvement of the validation loss (``hybrid.stopping.plateau``). Shares are of the training."""

    enabled: bool = True
    min_delta: float = 0.001  # nats; a smaller fall is no improvement
    reduce: bool = True
    reduce_after: float = 0.15
    lr_factor: float = 0.6
    stop: bool = True
    stop_after: float = 0.2


@dataclass
class ReductionsRule:
    """Reductions of the learning rate by the plateau rule that did not help."""

    enabled: bool = True
    limit: int = 2
    min_gain: float = 0.01  # nats that a reduction has to bring


@dataclass
class OscillationRule:
    enabled: bool = True
    swing: float = 0.5  # nats from trough to crest of the validation loss
    window: float = 0.2  # share of the training
    rises: int = 2  # of more than ``swing`` within the window


@dataclass
class CollapseRule:
    """A branch's output is constant."""

    enabled: bool = True
    variance: float = 1e-6
    probes: int = 2  # in a row


@dataclass
class GradRatioRule:
    """The gradient ratio RWKV/Mamba is outside the limits in every logged row."""

    enabled: bool = True
    low: float = 0.1
    high: float = 10.0
    share: float = 0.05  # of the training ...
    min_steps: int = 250  # ... and at least so many steps


@dataclass
class StoppingConfig:
    """Rules that end a run early or lower its learning rate. What they find stands in the record in any case."""

    act: bool | None = None  # whether they act; where it is not set: in single runs, not in those of a sweep
    overfitting: OverfittingRule = field(default_factory=OverfittingRule)
    plateau: PlateauRule = field(default_factory=PlateauRule)
    reductions: ReductionsRule = field(default_factory=ReductionsRule)
    oscillation: OscillationRule = field(default_factory=OscillationRule)
    collapse: CollapseRule = field(default_factory=CollapseRule)
    grad_ratio: GradRatioRule = field(default_factory=GradRatioRule)


@dataclass
class Band:
    """A gate passes inside ``passes``, warns inside ``warns`` and fails elsewhere; both [low, high]."""

    passes: list[float]
    warns: list[float]


@dataclass
class OnFailConfig:
    """What a failed gate does: warn | stop."""

    G0: str = "stop"
    G1: str = "stop"
    G2: str = "warn"
    G3: str = "warn"
    G3_5: str = "warn"
    G4: str = "warn"


@dataclass
class EntropyGateConfig:
    """G2: entropy of the next-token distribution at step 0."""

    reading: str = "normalised"  # normalised | specified: which decides
    specified: Band = field(default_factory=lambda: Band([2.0, 5.0], [1.0, 8.0]))  # nats
    normalised: Band = field(default_factory=lambda: Band([0.9, 1.01], [0.7, 1.01]))  # divided by ln V


@dataclass
class TrainingGateConfig:
    """G3: the first steps."""

    steps: int = 1000
    grad_norm: Band = field(default_factory=lambda: Band([0.5, 1.5], [0.0, 5.0]))  # median


@dataclass
class StateGateConfig:
    """G3.5: health of the recurrent states, at every evaluation; shares are parts of 1."""

    reading: str = "calibrated"  # calibrated | specified: which cosine decides
    cosine: Band = field(default_factory=lambda: Band([-1.0, 0.95], [-1.0, 0.99]))
    top5_share: Band = field(default_factory=lambda: Band([0.5, 1.0], [0.3, 1.0]))
    saturated: Band = field(default_factory=lambda: Band([0.0, 0.1], [0.0, 0.3]))  # share of |values| > 5
    closed_gates: Band = field(default_factory=lambda: Band([0.0, 0.1], [0.0, 0.3]))  # share within 0.01 of 0 or 1
    least_variance: float = 1e-6  # of a branch's output; below, the branch is dead


@dataclass
class BalanceGateConfig:
    """G4: gradient ratio RWKV/Mamba."""

    every: int = 100  # steps
    grad_ratio: Band = field(default_factory=lambda: Band([0.3, 3.0], [0.1, 10.0]))


@dataclass
class GatesConfig:
    """The specification's checks on every run (``hybrid.gates``)."""

    enabled: bool = True
    on_fail: OnFailConfig = field(default_factory=OnFailConfig)
    G2: EntropyGateConfig = field(default_factory=EntropyGateConfig)
    G3: TrainingGateConfig = field(default_factory=TrainingGateConfig)
    G3_5: StateGateConfig = field(default_factory=StateGateConfig)
    G4: BalanceGateConfig = field(default_factory=BalanceGateConfig)


@dataclass
class SearchConfig:
    """A search with Optuna, in every arm of the sweep; none where ``n_trials`` is not set."""

    n_trials: int | None = None  # in all, over every call and every worker
    # key -> {type: float|int, low:, high:, log:, step:} or {type: categorical, choices:}, each with an optional
    # when: {earlier key: value or list of values}
    space: dict[str, Any] = field(default_factory=dict)
    metric: Any = "best_val_loss"  # a number of summary.json, or a list of them (multi-objective)
    direction: Any = "minimize"  # minimize | maximize, or a list, one for each metric
    enqueue: list[Any] = field(default_factory=list)  # known baselines, {key: value}: tried first, never pruned
    sampler: dict[str, Any] = field(default_factory=dict)  # _target_ and arguments
    pruner: dict[str, Any] = field(default_factory=dict)
    study_name: str | None = None  # the sweep's name where it is not set; with arms, the arm is added
    storage: str | None = None  # a database URL; a journal file in the sweep's folder where it is not set
    workers: int | None = None  # how many share a study; as many as the launcher runs at once where it is not set


@dataclass
class SweepConfig:
    """A named comparison: arms x grid x seeds. Every arm runs on the same seeds."""

    name: str | None = None
    question: str | None = None
    baseline: str | None = None
    arms: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides
    grid: dict[str, list[Any]] = field(default_factory=dict)  # key -> values, all combinations
    only: list[str] | None = None  # of the arms, run these
    seeds: list[int] | None = None  # each sets seed_init and seed_data
    together: list[Any] | None = None  # what is its own of each run of a job (sweeps.grouping); set by the sweeper
    retry_failed: bool = False  # run failed runs again
    dry_run: bool = False  # only list the runs, with an estimate of their time
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass
class DisplayConfig:
    """What a person sees while it runs; never part of a run's identity."""

    progress: str = "auto"  # auto | bar | plain | off
    run_index: int = 1
    run_total: int = 1
    sweep_started: float | None = None  # seconds since the epoch


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    display: DisplayConfig = field(default_factory=DisplayConfig)
    seed_init: int = 0  # initialisation and dropout
    seed_data: int = 0  # order of the training batches
    variant: str | None = None  # the arm's name in tables and folders
    out: str = "outputs"
