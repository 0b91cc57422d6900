"""A GPT in Flax: pre-norm, causal, tied embeddings, no biases.

B sequences, T tokens each, C channels, H heads, L layers, V words.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import sharding


def norm(name, x):
  """Layer norm without a bias, in float32."""
  return nn.LayerNorm(use_bias=False, name=name)(x.astype(jnp.float32))


def attend(q, k, v):
  """Causal attention by softmax, in float32; all are (B, T, H, C/H)."""
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

    # GPT-2 shrinks what is added to the residual stream 2 L times.
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
    num_heads: H, divides width.
    width: C.
    dtype: type of the activations; parameters are float32.
    unroll: layers per iteration of the scan over layers. 1 compiles fastest,
      L runs fastest where layers are small; the parameters are the same.
    remat: whether the backward pass computes the activations of a layer again
      instead of keeping them: a third more FLOPs, memory of one layer.
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
    # Gathered once for both ends of the model.
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
  """Returns True for the matrices, which are what weight decay is for.

  By name and not by rank: in scanned layers a scale has two axes too.

  Args:
    params: parameters of `GPT`.

  Returns:
    A tree of bools like `params`: kernels and the token embedding.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ('kernel', 'embedding'), params
  )
