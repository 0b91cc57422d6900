"""Checkpoints that are either whole or not there, and the run's record."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

# What may differ between a run and the one that resumes it.
_FREE = ('out_dir', 'data_dir', 'checkpoint_interval', 'mesh')


@jax.jit
def _all_finite(tree):
  return jnp.array(
    [
      jnp.isfinite(x).all()
      for x in jax.tree.leaves(tree)
      if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
  ).all()


class Checkpoints:
  """Saves and restores (state, record); does nothing without an out_dir.

  Orbax writes into a folder of another name and renames it at the end, so a
  process that is killed while it writes leaves the checkpoint before.
  """

  def __init__(self, config):
    self._settings = dataclasses.asdict(config)
    self._manager = None
    if config.out_dir:
      # The next step reuses the memory of this state (it is donated), so the
      # write is not left to a thread.
      self._manager = ocp.CheckpointManager(
        os.path.abspath(config.out_dir),
        options=ocp.CheckpointManagerOptions(
          max_to_keep=2,
          enable_async_checkpointing=False,
          cleanup_tmp_directories=True,
        ),
      )

  def save(self, step, state, record):
    """Saves the state after `step` steps, unless that was done already.

    Args:
      step: number of steps done.
      state: arrays.
      record: what JSON can hold.

    Raises:
      FloatingPointError: if the state has a NaN or an infinity. Saved, it would
        in time replace all those that training can resume from.
      RuntimeError: if the checkpoint can't be written, as on a full disk.
    """
    if self._manager is None or self._manager.latest_step() == step:
      return
    if not _all_finite(state):
      raise FloatingPointError(
        f'The state after {step} steps must be finite to be saved, and is '
        f'not: training diverged. The same command {self._resumes()}; '
        'if it ends here again, pass a smaller learning rate and another '
        '--out_dir.'
      )
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          record=ocp.args.JsonSave(record),
          settings=ocp.args.JsonSave(self._settings),
        ),
      )
    except Exception as error:
      raise RuntimeError(
        f'The checkpoint of step {step} could not be written to '
        f'{self._manager.directory}, for the reason above. Once it can, as '
        'with space on the disk again, the same command '
        f'{self._resumes()}.'
      ) from error

  def restore(self, abstract_state):
    """Returns (step, state, record) of the newest checkpoint, or None.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.

    Returns:
      The number of steps done, the state and the record; None if there is no
      checkpoint.

    Raises:
      ValueError: if the checkpoint is of a run with other settings.
      RuntimeError: if it can't be read, as where a file was truncated.
    """
    step = None if self._manager is None else self._manager.latest_step()
    if step is None:
      return None
    # Settings first: with another width the state would not even load.
    settings = self._read(step, settings=ocp.args.JsonRestore()).settings
    changed = [
      f'{name}: {settings.get(name)!r} then, {value!r} now'
      for name, value in self._settings.items()
      if name not in _FREE and settings.get(name) != value
    ]
    if changed:
      raise ValueError(
        'A run is resumed with the settings that it began with. '
        f'{self._manager.directory} has other ones ({"; ".join(changed)}). '
        'Pass those, or another --out_dir.'
      )
    saved = self._read(
      step,
      state=ocp.args.StandardRestore(abstract_state),
      record=ocp.args.JsonRestore(),
    )
    return step, saved.state, saved.record

  def _read(self, step, **items):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
      # Not passed over in silence: steps would be lost, and perhaps the fault
      # is another one, which the checkpoint outlives.
      raise RuntimeError(
        f'{self._manager.directory / str(step)} could not be restored, for '
        'the reason above. If its files are damaged, delete that folder: the '
        f'same command then {self._resumes(step)}.'
      ) from error

  def _resumes(self, damaged=None):
    steps = set(self._manager.all_steps()) - {damaged}
    return f'resumes from step {max(steps)}' if steps else 'begins again'

  def close(self):
    if self._manager is not None:
      self._manager.close()


def load(out_dir, make_abstract_state):
  """Reads the newest checkpoint of a run, which may still be training.

  Args:
    out_dir: folder of the run; nothing in it is changed.
    make_abstract_state: function of the settings that returns shapes, dtypes
      and shardings of the state.

  Returns:
    (settings, state); the settings are a dictionary.

  Raises:
    FileNotFoundError: if there is no checkpoint.
  """
  with ocp.CheckpointManager(
    os.path.abspath(out_dir), options=ocp.CheckpointManagerOptions(create=False)
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise FileNotFoundError(
        f'{out_dir} must have a checkpoint of train_gpt.py, and has none. '
        'Pass the --out_dir of a run that has written one.'
      )
    settings = manager.restore(
      step, args=ocp.args.Composite(settings=ocp.args.JsonRestore())
    ).settings
    state = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(make_abstract_state(settings))
      ),
    ).state
  return settings, state
