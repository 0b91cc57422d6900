"""Saves and restores checkpoints, which are always complete."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

# Settings that may differ between a run and the one that resumes it.
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

  Orbax writes into a temporary folder and renames it at the end. If the process
  is killed while it writes, the previous checkpoint remains.
  """

  def __init__(self, config):
    self._settings = dataclasses.asdict(config)
    self._manager = None
    if config.out_dir:
      # Asynchronous writes would be unsafe: the next step reuses the memory of
      # this state, which is donated.
      self._manager = ocp.CheckpointManager(
        os.path.abspath(config.out_dir),
        options=ocp.CheckpointManagerOptions(
          max_to_keep=2,
          enable_async_checkpointing=False,
          cleanup_tmp_directories=True,
        ),
      )

  def save(self, step, state, record):
    """Saves the state after `step` steps, unless it is already saved.

    Args:
      step: number of steps done.
      state: tree of arrays.
      record: values that JSON can represent.

    Raises:
      FloatingPointError: if the state has a NaN or an infinity. Such
        checkpoints would in time replace all those that can be resumed from.
      RuntimeError: if the checkpoint can't be written, as on a full disk.
    """
    if self._manager is None or self._manager.latest_step() == step:
      return
    if not _all_finite(state):
      raise FloatingPointError(
        f'The state after {step} steps must be finite to be saved, but has a '
        f'NaN or an infinity: training diverged. The same command '
        f'{self._resumes()}; if it fails again, pass a smaller learning rate '
        'and another --out_dir.'
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
        f'{self._manager.directory}, see the error above. Fix the cause, for '
        'example free disk space. Then the same command '
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
      RuntimeError: if it can't be read, as when a file was truncated.
    """
    step = None if self._manager is None else self._manager.latest_step()
    if step is None:
      return None
    # Settings first, because a state with another width could not be loaded.
    settings = self._read(step, settings=ocp.args.JsonRestore()).settings
    changed = [
      f'{name}: {settings.get(name)!r} saved, {value!r} now'
      for name, value in self._settings.items()
      if name not in _FREE and settings.get(name) != value
    ]
    if changed:
      raise ValueError(
        'A run must be resumed with the settings that it began with, but '
        f'{self._manager.directory} has others ({"; ".join(changed)}). Pass '
        'the saved settings, or another --out_dir.'
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
      # Using an older checkpoint instead would lose steps without notice. The
      # cause may not be in the checkpoint, which is then still good.
      raise RuntimeError(
        f'{self._manager.directory / str(step)} could not be restored, see '
        'the error above. If its files are damaged, delete that folder. Then '
        f'the same command {self._resumes(step)}.'
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
    out_dir: folder of the run. It is not changed.
    make_abstract_state: function of the settings that returns shapes, dtypes
      and shardings of the state.

  Returns:
    (settings, state), the settings as a dictionary.

  Raises:
    FileNotFoundError: if there is no checkpoint.
  """
  with ocp.CheckpointManager(
    os.path.abspath(out_dir), options=ocp.CheckpointManagerOptions(create=False)
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise FileNotFoundError(
        f'{out_dir} must have a checkpoint of train_gpt.py, but has none. '
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
