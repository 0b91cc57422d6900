"""Settings of train_gpt.py. Each field is a flag with the same name."""

import dataclasses
import math

import sharding

OPTAX = ('adamw', 'lion')  # Those that `sophiaw` does not make.
OPTIMIZERS = (*OPTAX, 'nadamw', 'sophia_h', 'sophia_g')


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of one run. A step has B sequences of T tokens."""

  # Data.
  data_dir: str = ''  # with train.bin, val.bin; '': the standard library
  seed: int = 0  # for parameters and batches

  # Model.
  vocab_size: int = 256
  block_size: int = 64  # T
  num_layers: int = 2
  num_heads: int = 2
  width: int = 64
  dtype: str = 'float32'  # of activations
  unroll: int = 2  # layers per iteration of the scan over layers
  remat: bool = False  # compute activations again instead of storing them
  # Number of parts of each sequence, a divisor of T. Only the logits of one
  # part are in memory at a time. With more than 1, the gradient computes logits
  # twice.
  head_chunks: int = 1

  # Training.
  num_steps: int = 480
  batch_size: int = 32  # B, over all micro-batches
  # Sequences in memory at once, a divisor of B. On a CPU small is fast: the
  # activations of 32 sequences of the demo's model fit into the cache.
  micro_batch_size: int = 32
  eval_interval: int = 20  # steps between validations
  eval_batches: int = 8  # number of batches of micro_batch_size sequences

  # Optimizer. Sophia has the hyperparameters of AdamW.
  optimizer: str = 'sophia_h'  # one of OPTIMIZERS
  learning_rate: float = 9.22e-3  # after warm-up; then it decays by a cosine
  final_learning_rate: float = 0.05  # at the end, relative to learning_rate
  warmup_steps: int = 120
  b1: float = 0.89
  b2: float = 0.925
  weight_decay: float = 0.1  # for matrices only
  clip_norm: float = 1.0  # limit on the global norm of the gradient
  curvature_fraction: float = 0.25  # Sophia: of the batch, for a refresh
  eigenbasis: bool = False  # of each matrix, for Sophia and NAdamW (SOAP)

  # Devices: name:size of each mesh axis, such as 'data:2,fsdp:4'. '': one
  # device.
  mesh: str = ''

  # Output.
  out_dir: str = ''  # folder for checkpoints; a run resumes from the newest one
  checkpoint_interval: int = 240

  def __post_init__(self):
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(
        f'optimizer must be one of {", ".join(OPTIMIZERS)}; '
        f'got {self.optimizer!r}.'
      )
    if self.eigenbasis and self.optimizer in OPTAX:
      raise ValueError(
        'eigenbasis needs another optimizer than '
        f'{" or ".join(OPTAX)}, such as nadamw; got {self.optimizer!r}.'
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
    if not 0 < self.curvature_fraction <= 1:
      raise ValueError(
        'curvature_fraction must be above 0 and at most 1; got '
        f'{self.curvature_fraction}.'
      )
    num_devices, axes = self._num_devices, sharding.parse(self.mesh)
    sizes = {'micro_batch_size': self.micro_batch_size}
    if self.optimizer.startswith('sophia'):
      sizes['batch_size * curvature_fraction'] = self.curvature_batch_size
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

  @property
  def _num_devices(self) -> int:
    return math.prod(sharding.parse(self.mesh).values())

  @property
  def curvature_batch_size(self) -> int:
    """Number of sequences whose curvature `sophiaw` estimates."""
    return math.ceil(self.batch_size / round(1 / self.curvature_fraction))

  @property
  def curvature_parts(self) -> int:
    """Number of parts: up to 8, or as many as a micro-batch's memory needs.

    Each part has the same number of sequences on each device.
    """
    per_device = self.curvature_batch_size // self._num_devices
    divisors = [n for n in range(1, per_device + 1) if per_device % n == 0]
    needed = min(
      n
      for n in divisors
      if self.curvature_batch_size // n <= self.micro_batch_size
    )
    return max(n for n in divisors if n <= max(8, needed))


CONFIGS = {
  # AdamW's settings are those of the best trial in benchmarks/convergence.json,
  # before its learning rate is swept.
  'demo': Config(),
  # GPT-2 small, with AdamW's settings of nanoGPT.
  'gpt2_124m': Config(
    vocab_size=50304,
    block_size=1024,
    num_layers=12,
    num_heads=12,
    width=768,
    dtype='bfloat16',
    unroll=1,
    remat=True,
    num_steps=100_000,
    batch_size=480,
    micro_batch_size=8,
    eval_interval=1000,
    eval_batches=64,
    learning_rate=6e-4,
    warmup_steps=2000,
    b1=0.9,
    b2=0.95,
    checkpoint_interval=1000,
  ),
}
