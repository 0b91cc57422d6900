"""A training loop, in two files: adamw_loop.py and sophia_loop.py.

python examples/sophia_loop.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def predict_fn(params, batch):
  hidden = jnp.tanh(batch['x'] @ params['hidden'])  # (B, 16)
  return hidden @ params['output']  # logits (B, 4)


def loss_fn(params, batch):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    predict_fn(params, batch), batch['y']
  )
  return losses.mean()


optimizer = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)


@jax.jit
def step(params, state, batch):
  loss, grads = jax.value_and_grad(loss_fn)(params, batch)
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state, loss


rng = np.random.default_rng(0)
params = {
  'hidden': jnp.float32(rng.normal(0, 0.3, (8, 16))),
  'output': jnp.float32(rng.normal(0, 0.3, (16, 4))),
}
state = optimizer.init(params)
losses = []
for _ in range(200):
  x = np.float32(rng.normal(size=(64, 8)))
  batch = {'x': x, 'y': np.argmax(x[:, :4], axis=-1)}
  params, state, loss = step(params, state, batch)
  losses.append(float(loss))
print(f'The loss decreases from {losses[0]:.2f} to {losses[-1]:.2f}.')
