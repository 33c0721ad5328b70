"""Supervised fine-tuning run, from opening the conversations to the last step."""

import contextlib
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from train.config.sft_config import PRESETS, SFT, SftConfig
from train.conversations import encoded
from train.finetuning import batches, conversation_batches
from train.finetuning.conversation_batches import ConversationBatches
from train.finetuning.sft_preparation import Prepared, prepare, read_weights
from train.loop import continuation, messages, opening, training_loop
from train.loop.subspace_report import check_has_subspaces
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step import given_weights, optimizers
from train.step.mesh import check_batch, make_mesh
from train.step.setup import supervised
from train.step.throughput import Counted
from train.step.train_state import TrainState
from train.system import console, out_of_memory, processes

# Tokens of the first conversation that a run shows.
_SHOWN_TOKENS = 300


class _Run:
    """A run with its conversations in batches.

    Args:
      prepared: the run's config, conversations and tokenizer.
      mesh: the devices, set as JAX's mesh.
    """

    def __init__(self, prepared: Prepared, mesh: Mesh):
        self.config, self.data = prepared.config, prepared.data
        data, part = self.config.data, processes.own_part
        size = data.batch_size_sequences
        self.tokenizer = prepared.tokenizer
        self.setup = supervised(self.config, mesh)
        self.rows = conversation_batches.training_batches(
            data, self.data.train, self.config.seed, part(size)
        )
        self._held_out = conversation_batches.padded_batches(
            data, self.data.held_out, part(size)
        )

    def train_batches(self) -> Any:
        """Opens the training batches at their beginning."""
        return batches.shuffled_batches(self.rows, self.config.seed)

    def epoch(self, iterator: Any) -> float:
        """Passes over the training conversations so far."""
        per_epoch = -(-len(self.rows) // self.rows.size)
        return batches.epochs(iterator.get_state(), per_epoch)

    def begin_evaluation(self, params: Any) -> Callable[[], dict[str, float]]:
        """Dispatches an evaluation of all held-out conversations."""
        each = (batch for _, batch in batches.ordered_batches(self._held_out))
        finish = self.setup.begin_evaluation(params, each)
        return lambda: {"eval_loss": finish()}


def sft(
    run: _Run,
    found: Found | None,
    checkpoints: Checkpoints,
    read_params: Callable[[], Any],
) -> int:
    """Trains to the last step; arguments and errors: see `running.finetune`.

    Returns:
      The exit code: 0, or that of the signal that stopped the run.
    """
    config, setup = run.config, run.setup
    out_of_memory.check(setup.abstract_state)
    state, iterator = training_loop.begin(
        config, setup, run.train_batches, checkpoints, found, read_params
    )
    first, evaluated = int(state.step), None
    opening.save_settings(config, found, state)
    print(_summary(run, state))
    if first == 0:
        evaluated = training_loop.evaluate_first(
            setup, state, run.begin_evaluation, _example(run.rows)
        )
        print(f"\nBefore training, held-out loss {evaluated['eval_loss']:.3f}\n")
    else:
        print(f"\nContinued after step {first:,}.\n")
    if found and found.changes:
        print(continuation.describe(config, found, state), end="\n\n")
    mean = run.rows.lengths.mean() * run.rows.size
    finished = training_loop.train(
        config,
        setup,
        state,
        iterator,
        checkpoints,
        Counted("tokens", round(mean), of_loss="answer_tokens"),
        epoch=run.epoch,
        begin_evaluation=run.begin_evaluation,
        first_evaluation=evaluated,
    )
    if finished.interruption is not None:
        print(messages.stopped(finished, SFT, config.output_dir))
        return finished.interruption.exit_code
    print(_outcome(finished.rows, config))
    return 0


def _example(rows: ConversationBatches) -> batches.Batch:
    return rows(np.arange(min(rows.size, len(rows))))


def _summary(run: _Run, state: TrainState) -> str:
    """Summary of a run at its start, with the first conversation."""
    config, data = run.config, run.data
    own = data.train.place(0)
    ids, counted = data.train.tokens[own], data.train.counted[own]
    shown = encoded.show(run.tokenizer, ids[:_SHOWN_TOKENS], counted[:_SHOWN_TOKENS])
    more = " ..." if len(ids) > _SHOWN_TOKENS else ""
    tokens = len(data.train.tokens)
    share = data.train.counted.sum() / tokens
    preset = PRESETS[config.preset].optimizer
    return messages.model_and_optimizer(
        config.init_from, config.optimizer, preset, state
    ) + (
        f"Rows       {data.description}\n"
        f"Loss       on {config.data.loss_on}: {share:.0%} of {tokens:,} tokens\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_sequences:,} rows\n"
        f"Output     {config.output_dir}\n"
        "First conversation, with the tokens that the loss counts in brackets:\n"
        f"{shown}{more}"
    )


def _outcome(rows: list[dict[str, Any]], config: SftConfig) -> str:
    """Describes the held-out losses, and lists commands to use a finished run."""
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    place = config.output_dir
    directory = shlex.quote(str(place))
    return (
        f"\nAfter training, held-out loss {losses[max(losses)]:.3f}; the best was "
        f"{losses[best]:.3f} at step {best:,}\n"
        f"Metrics, curve, tokenizer, config and checkpoints are in {place}\n"
        f"Chat       python -m train.generate --chat --checkpoint {directory}\n"
        f"Export     python -m train.export --checkpoint {directory} --to hf"
    )


def run(config: SftConfig) -> int:
    """Opens conversations, model, directory and devices, trains, returns the exit code.

    Errors that a user can cause end the program with one line.
    """
    with contextlib.ExitStack() as stack:
        with console.user_errors(ValueError, OSError):
            opening.start(stack, config)
            with processes.together(ValueError):
                check_has_subspaces(config)
                mesh = make_mesh(config.mesh)
                size = config.data.batch_size_sequences
                check_batch(size, config.gradient_accumulation_steps, mesh)
                prepared = prepare(config, opening.warn_once)
                config = prepared.config
                optimizers.check_rank(config.optimizer, config.model)
            found = opening.open_shared(stack, config)
            with processes.together(ValueError):
                read_params = given_weights.held(
                    lambda: read_weights(prepared), now=not found
                )
                if processes.is_first() and not found:
                    opening.save_new(config, prepared.tokenizer)
        with opening.training(config, mesh) as checkpoints:
            return sft(_Run(prepared, mesh), found, checkpoints, read_params)
