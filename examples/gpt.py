"""A GPT in Flax, with pre-norm, causal attention, tied embeddings, no biases.

Shapes: B sequences, T tokens, C channels, H heads, L layers, V token types.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import sharding


def norm(name, x):
  """Layer norm without a bias, in float32."""
  return nn.LayerNorm(use_bias=False, name=name)(x.astype(jnp.float32))


def attend(q, k, v):
  """Causal softmax attention in float32. All arrays are (B, T, H, C/H)."""
  scores = jnp.einsum(
    'bthc,bshc->bhts', q, k, preferred_element_type=jnp.float32
  )
  scores *= q.shape[-1] ** -0.5  # (B, H, T, T)
  past = jnp.tril(jnp.ones(scores.shape[-2:], jnp.bool))
  weights = jax.nn.softmax(scores, where=past).astype(v.dtype)
  return jnp.einsum('bhts,bshc->bthc', weights, v)


class Block(nn.Module):
  """One transformer layer on flattened activations."""

  num_heads: int
  num_layers: int
  seq_len: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, _):
    channels = x.shape[-1]
    heads = (-1, self.seq_len, self.num_heads, channels // self.num_heads)

    def dense(features, stddev=0.02):
      return nn.Dense(
        features,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=nn.initializers.normal(stddev),
      )

    # As in GPT-2, weights of the 2 L additions to the residual stream are
    # initialized smaller.
    residual = 0.02 / (2 * self.num_layers) ** 0.5

    qkv = dense(3 * channels)(norm('norm_1', x))  # (B·T, 3·C)
    q, k, v = (a.reshape(heads) for a in jnp.split(qkv, 3, axis=-1))
    y = attend(q, k, v)  # (B, T, H, C/H)
    x = x + dense(channels, residual)(y.reshape(x.shape))  # (B·T, C)

    y = nn.gelu(dense(4 * channels)(norm('norm_2', x)))  # (B·T, 4·C)
    return x + dense(channels, residual)(y), None  # (B·T, C)


class GPT(nn.Module):
  """Maps tokens (B, T) to float32 logits (B, T, V).

  Attributes:
    vocab_size: V.
    block_size: largest T.
    num_layers: L.
    num_heads: H, a divisor of width.
    width: C.
    dtype: dtype of the activations. Parameters are float32.
    unroll: layers per iteration of the scan over layers. 1 compiles fastest; L
      runs fastest if layers are small. The parameters are the same.
    remat: whether the backward pass computes the activations of each layer
      again. This takes a third more FLOPs, and memory for one layer only.
  """

  vocab_size: int
  block_size: int
  num_layers: int
  num_heads: int
  width: int
  dtype: jnp.dtype = jnp.float32
  unroll: int = 1
  remat: bool = False

  def setup(self):
    self.tokens = nn.Embed(
      self.vocab_size,
      self.width,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(0.02),
    )
    # Gathered once for both uses, the embedding and the head.
    self.table = sharding.whole(self.tokens.embedding).astype(self.dtype)

  def __call__(self, tokens):
    return self.head(self.hidden(tokens))

  @nn.compact
  def hidden(self, tokens):
    """Maps tokens (B, T) to the hidden states of the last layer, (B, T, C)."""
    seq_len = tokens.shape[1]
    positions = self.param(
      'positions', nn.initializers.normal(0.02), (self.block_size, self.width)
    )[:seq_len].astype(self.dtype)  # (T, C)

    x = jnp.take(self.table, tokens, axis=0) + positions  # (B, T, C)
    # One matrix (B·T, C) instead of (B, T, C): CPUs multiply it twice as fast.
    x = x.reshape(-1, self.width)  # (B·T, C)
    layers = nn.scan(
      nn.remat(Block, prevent_cse=False) if self.remat else Block,
      length=self.num_layers,
      unroll=self.unroll,
      variable_axes={'params': 0},
      split_rngs={'params': True},
    )
    x, _ = layers(
      self.num_heads, self.num_layers, seq_len, self.dtype, name='layers'
    )(x, None)
    x = norm('norm', sharding.divide(x)).astype(self.dtype)  # (B·T, C)
    return x.reshape(*tokens.shape, self.width)  # (B, T, C)

  def head(self, hidden):
    """Maps hidden states (B, T, C), for any T, to logits (B, T, V)."""
    x = sharding.divide(hidden.reshape(-1, self.width))  # (B·T, C)
    logits = sharding.divide(x @ self.table.T).astype(jnp.float32)  # (B·T, V)
    return logits.reshape(*hidden.shape[:-1], self.vocab_size)  # (B, T, V)


def decay_mask(params):
  """Returns a mask for weight decay, True for matrices.

  It goes by names. Ranks do not tell, because scales of scanned layers have two
  axes as well.

  Args:
    params: parameters of `GPT`.

  Returns:
    A tree of bools like `params`, True for kernels and the token embedding.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )
