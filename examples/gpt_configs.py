"""Settings of train_gpt.py. Each field is a flag with the same name."""

import dataclasses
import math

import sharding

OPTIMIZERS = ('adamw', 'nadamw', 'lion', 'sophia_h', 'sophia_g')


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of one run. A step has B sequences of T tokens."""

  # Data.
  data_dir: str = ''  # with train.bin, val.bin; '': the standard library
  seed: int = 0  # for parameters, batches and curvature probes

  # Model.
  vocab_size: int = 256
  block_size: int = 64  # T
  num_layers: int = 2
  num_heads: int = 2
  width: int = 64
  dtype: str = 'float32'  # of activations
  unroll: int = 1  # layers per iteration of the scan over layers
  remat: bool = False  # compute activations again instead of storing them
  # Number of parts of each sequence, a divisor of T. Only the logits of one
  # part are in memory at a time. With more than 1, the gradient computes logits
  # twice.
  head_chunks: int = 1

  # Training.
  num_steps: int = 1800
  batch_size: int = 32  # B, over all micro-batches
  # Sequences in memory at once, a divisor of B. On a CPU small is fast: the
  # activations of 32 sequences of the demo's model fit into the cache.
  micro_batch_size: int = 32
  eval_interval: int = 60  # steps between validations
  eval_batches: int = 16  # number of batches of micro_batch_size sequences

  # Optimizer.
  optimizer: str = 'adamw'  # one of OPTIMIZERS
  learning_rate: float = 1e-2  # after warm-up; then it decays by a cosine
  final_learning_rate: float = 0.05  # at the end, relative to learning_rate
  warmup_steps: int = 100
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.1  # for matrices only
  clip_norm: float = 1.0  # limit on the global norm of the gradient
  gamma: float = 0.01  # Sophia: scale of the curvature; rho of Sophia-G
  # At the end, relative to gamma, which decays by a cosine over the second
  # half.
  final_gamma: float = 1.0
  target_win_rate: float = 0.0  # Sophia: gamma is adjusted to reach it; 0: off
  update_interval: int = 10  # Sophia: steps between curvature estimates
  curvature_batch_size: int = 32  # Sophia: sequences for each refresh
  curvature_parts: int = 1  # Sophia: estimates per refresh, each on its part
  nesterov: bool = False  # Sophia: Nesterov momentum
  # Sophia: bias correction of h, and in Sophia-G of m. Sophia-H always has it.
  bias_correction: bool = False
  # Sophia: b2 of Adam, whose update limits each element. 0: no limit.
  adam_b2: float = 0.0

  # Devices: name:size of each mesh axis, such as 'data:2,fsdp:4'. '': one
  # device.
  mesh: str = ''

  # Output.
  out_dir: str = ''  # folder for checkpoints; a run resumes from the newest one
  checkpoint_interval: int = 100

  def __post_init__(self):
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(
        f'optimizer must be one of {", ".join(OPTIMIZERS)}; '
        f'got {self.optimizer!r}.'
      )
    for name in (
      'num_steps',
      'batch_size',
      'micro_batch_size',
      'block_size',
      'eval_interval',
      'eval_batches',
      'checkpoint_interval',
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1; got {getattr(self, name)}.'
        )
    if not 0 <= self.warmup_steps < self.num_steps:
      raise ValueError(
        'warmup_steps must be at least 0 and below num_steps = '
        f'{self.num_steps}; got {self.warmup_steps}.'
      )
    if self.head_chunks < 1 or self.block_size % self.head_chunks:
      raise ValueError(
        f'head_chunks must divide block_size = {self.block_size}; '
        f'got {self.head_chunks}.'
      )
    if self.batch_size % self.micro_batch_size:
      raise ValueError(
        'batch_size must be a multiple of micro_batch_size; got '
        f'{self.batch_size} and {self.micro_batch_size}.'
      )
    if not 1 <= self.curvature_batch_size <= self.batch_size:
      raise ValueError(
        'curvature_batch_size must be 1 to batch_size = '
        f'{self.batch_size}; got {self.curvature_batch_size}.'
      )
    if self.curvature_parts < 1 or (
      self.curvature_batch_size % self.curvature_parts
    ):
      raise ValueError(
        'curvature_parts must divide curvature_batch_size = '
        f'{self.curvature_batch_size}; got {self.curvature_parts}.'
      )
    axes = sharding.parse(self.mesh)
    num_devices = math.prod(axes.values())
    sizes = {'micro_batch_size': self.micro_batch_size}
    if self.optimizer.startswith('sophia'):
      sizes['curvature_batch_size / curvature_parts'] = (
        self.curvature_batch_size // self.curvature_parts
      )
    for name, size in sizes.items():
      if size % num_devices:
        raise ValueError(
          f'{name} must be a multiple of the {num_devices} devices of mesh '
          f'{self.mesh!r}, so that each gets the same number of sequences; '
          f'got {size}.'
        )
    if self.width % axes.get('fsdp', 1):
      raise ValueError(
        'width must be a multiple of the fsdp axis of the mesh; got '
        f'{self.width} and {self.mesh!r}.'
      )
    if self.width % self.num_heads:
      raise ValueError(
        'width must be a multiple of num_heads; got '
        f'{self.width} and {self.num_heads}.'
      )

  @property
  def tokens_per_step(self) -> int:
    return self.batch_size * self.block_size


def sophia_like(adamw: Config, optimizer: str) -> Config:
  """Derives settings for Sophia from settings for AdamW.

  They are those of `sophia_optax.sophiaw`, but the curvature is that of the
  first quarter of the batch, and γ of Sophia-H falls instead of adapting.

  Args:
    adamw: AdamW's settings.
    optimizer: 'sophia_h' or 'sophia_g'.
  """
  if optimizer == 'sophia_g':
    changes = {
      'gamma': 0.1,
      'target_win_rate': 0.3,
      'curvature_parts': math.gcd(8, adamw.batch_size // 4),
    }
  else:
    changes = {'gamma': 0.05, 'final_gamma': 0.1}
  return dataclasses.replace(
    adamw,
    optimizer=optimizer,
    b2=0.95,
    adam_b2=adamw.b2,
    nesterov=True,
    bias_correction=True,
    update_interval=10,
    curvature_batch_size=adamw.batch_size // 4,
    **changes,
  )


# Takes five to ten minutes on two CPU cores. AdamW's settings are those of
# the best trial in benchmarks/convergence.json, before its learning rate is
# swept.
_DEMO = Config(
  unroll=2,
  learning_rate=0.00922,
  warmup_steps=450,
  b1=0.89,
  b2=0.925,
  checkpoint_interval=600,
)

# GPT-2 small. Batch, schedule, curvature batches, b1, b2, k, eps and gamma are
# those of arXiv:2305.14342. Sophia's learning rate and weight decay are those
# of its authors' code for Sophia-G at this size. AdamW's settings are those of
# nanoGPT. The paper makes one estimate per curvature batch, this one several.
_GPT2_124M = Config(
  vocab_size=50304,
  block_size=1024,
  num_layers=12,
  num_heads=12,
  width=768,
  dtype='bfloat16',
  remat=True,
  num_steps=100_000,
  batch_size=480,
  micro_batch_size=8,
  eval_interval=1000,
  eval_batches=64,
  checkpoint_interval=1000,
  learning_rate=6e-4,
  warmup_steps=2000,
)

CONFIGS = {
  'demo': {
    'adamw': _DEMO,
    'nadamw': dataclasses.replace(_DEMO, optimizer='nadamw'),
    'sophia_h': sophia_like(_DEMO, 'sophia_h'),
    'sophia_g': sophia_like(_DEMO, 'sophia_g'),
  },
  'gpt2_124m': {
    'adamw': dataclasses.replace(
      _GPT2_124M, optimizer='adamw', b1=0.9, b2=0.95
    ),
    'sophia_h': dataclasses.replace(
      _GPT2_124M,
      optimizer='sophia_h',
      b1=0.96,
      b2=0.99,
      eps=1e-12,
      weight_decay=0.2,
      curvature_parts=4,
    ),
    'sophia_g': dataclasses.replace(
      _GPT2_124M,
      optimizer='sophia_g',
      b1=0.96,
      b2=0.99,
      gamma=0.05,
      weight_decay=0.2,
      curvature_batch_size=240,
      curvature_parts=30,
    ),
  },
}


def get_config(name: str, optimizer: str, **overrides) -> Config:
  """Returns the named settings for an optimizer.

  Args:
    name: a key of `CONFIGS`.
    optimizer: one of `OPTIMIZERS`.
    **overrides: fields of `Config` to replace.

  Returns:
    The settings.

  Raises:
    ValueError: if there is no such name, or a setting is invalid.
  """
  if name not in CONFIGS:
    raise ValueError(
      f'config must be one of {", ".join(CONFIGS)}; got {name!r}.'
    )
  if optimizer not in CONFIGS[name]:
    raise ValueError(
      f'optimizer must be one of {", ".join(CONFIGS[name])}; got {optimizer!r}.'
    )
  return dataclasses.replace(CONFIGS[name][optimizer], **overrides)
