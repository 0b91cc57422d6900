"""Checkpoints that are either whole or not there, and the run's record."""

import dataclasses
import os

import jax
import orbax.checkpoint as ocp

# What may differ between a run and the one that takes it up again.
_FREE = ('out_dir', 'data_dir', 'checkpoint_interval')


class Checkpoints:
  """Saves and restores (state, record); does nothing without an out_dir.

  Orbax writes into a folder of another name and renames it at the end, so a
  process that is killed while it writes leaves the checkpoint before.
  """

  def __init__(self, config):
    self._settings = dataclasses.asdict(config)
    for name in _FREE:
      del self._settings[name]
    self._manager = None
    if config.out_dir:
      # The next step reuses the memory of this state (it is donated), so the
      # write is not left to a thread.
      self._manager = ocp.CheckpointManager(
          os.path.abspath(config.out_dir),
          options=ocp.CheckpointManagerOptions(
              max_to_keep=2, enable_async_checkpointing=False,
              cleanup_tmp_directories=True))

  def save(self, step, state, record):
    """Saves the state after `step` steps, unless that was done already."""
    if self._manager is None or self._manager.latest_step() == step:
      return
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(record),
        settings=ocp.args.JsonSave(self._settings)))

  def restore(self, abstract_state):
    """Returns (step, state, record) of the newest checkpoint, or None.

    Args:
      abstract_state: shapes and dtypes of the state.

    Returns:
      The number of steps done, the state and the record; None if there is no
      checkpoint.

    Raises:
      ValueError: if the checkpoint is of a run with other settings.
    """
    step = None if self._manager is None else self._manager.latest_step()
    if step is None:
      return None
    # Settings first: with another width the state would not even load.
    settings = self._manager.restore(step, args=ocp.args.Composite(
        settings=ocp.args.JsonRestore())).settings
    changed = [
        f'{name}: {settings.get(name)!r} then, {value!r} now'
        for name, value in self._settings.items()
        if settings.get(name) != value
    ]
    if changed:
      raise ValueError(
          'A run is resumed with the settings that it began with. '
          f'{self._manager.directory} has other ones ({"; ".join(changed)}). '
          'Pass those, or another --out_dir.')
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        abstract_state)
    saved = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        record=ocp.args.JsonRestore()))
    return step, saved.state, saved.record

  def close(self):
    if self._manager is not None:
      self._manager.close()
