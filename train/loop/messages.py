"""Messages of a run: summary, outcome, next commands."""

import math
import pathlib
import shlex
from typing import Any

import jax

from train.config import methods
from train.config.optimizer_config import OptimizerConfig
from train.config.presets import PRESETS
from train.config.pretrain_config import PRETRAIN, PretrainConfig
from train.data.dataset import Text
from train.loop.training_loop import Finished
from train.rundir.saved_config import CONFIG_FILE
from train.step.train_state import TrainState
from train.tokenization.tokenizer import Tokenizer


def model_and_optimizer(
    model: str,
    optimizer: OptimizerConfig,
    preset: OptimizerConfig,
    state: TrainState,
    *notes: str,
) -> str:
    """Sizes of model and optimizer, and the settings that the optimizer ignores.

    Args:
      model: name of the model.
      optimizer: the run's optimizer.
      preset: the optimizer of its preset, whose settings nobody asked for.
      state: the state.
      *notes: more about the optimizer.
    """

    def size(tree: Any) -> str:
        return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:.1f} MB"

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    unused = ", ".join(methods.unused(optimizer, preset))
    ignored = [f"it does not use {unused}"] if unused else []
    about = "; ".join([f"state of {size(state.opt_state)}", *ignored, *notes])
    return (
        f"Model      {model}: {count / 1e6:.1f} M parameters, {size(state.params)}\n"
        f"Optimizer  {optimizer.name}: {about}\n"
    )


def summary(config: PretrainConfig, text: Text, state: TrainState) -> str:
    """Summary of model, optimizer and text at the start of a run."""
    preset = PRESETS[config.preset].optimizer
    name = config.preset
    if config.init_from is not None:
        name = f"weights of {config.init_from}"
    return model_and_optimizer(name, config.optimizer, preset, state) + (
        f"Text       {text.description}\n"
        f"Documents  {_marks(text.tokenizer)}\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_tokens:,} tokens\n"
        f"Output     {config.output_dir}"
    )


def _marks(tokenizer: Tokenizer) -> str:
    """Describes the tokens that begin and end a document."""
    marks = [
        f"{verb} {tokenizer.name(i)}"
        for verb, ids in (
            ("begin with", tokenizer.document_start),
            ("end with", tokenizer.document_end),
        )
        for i in ids
    ]
    return ", ".join(marks)


def outcome(rows: list[dict[str, Any]], saved: list[int]) -> str:
    """Describes the last and the best held-out loss, and whether the best is saved."""
    # Rows may be missing.
    known = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
    finite = [(loss, step) for loss, step in known if math.isfinite(loss)]
    if not known:
        return "After training:"
    loss = known[-1][0]
    if not finite:
        return f"After training, held-out loss {loss:.3f}; it was never finite:"
    best, step = min(finite)
    perplexity = math.exp(min(loss, 700))  # exp overflows above
    text = f"After training, held-out loss {loss:.3f}, perplexity {perplexity:.2f}; "
    if step == known[-1][1]:
        return f"{text}it was never lower:"
    where = f"at step {step:,}" if step else "before training"
    kept = ", which is saved" if step in saved else ""
    return f"{text}the best was {best:.3f} {where}{kept}:"


def advice(config: PretrainConfig, rows: list[dict[str, Any]]) -> str | None:
    """Warning if a run ends with a held-out loss above that of its start."""
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    before, after = losses.get(0), losses.get(config.steps)
    if before is None or after is None or after <= before:  # False for NaN
        return None
    rate = config.optimizer.learning_rate
    return (
        f"held-out loss rose from {before:.3f} before training to {after:.3f}: try a "
        f"--learning-rate below {rate:g}, or more text"
    )


def resume(program: str, directory: pathlib.Path) -> str:
    """Command that resumes a run of a program."""
    return f"{program} --resume --output-dir {shlex.quote(str(directory))}"


def stopped(finished: Finished, program: str, directory: pathlib.Path) -> str:
    """Tells which signal stopped a run, and how to continue."""
    return (
        f"\nStopped by {finished.interruption.received.name} after step "
        f"{int(finished.state.step):,}, which is saved. To continue: "
        f"{resume(program, directory)}"
    )


def farewell(config: PretrainConfig) -> str:
    """Lists commands to use a finished run."""
    place = config.output_dir
    directory, saved = (shlex.quote(str(path)) for path in (place, place / CONFIG_FILE))
    return (
        f"Metrics, curve, tokenizer, config and checkpoints are in {place}\n"
        f"Resume     {resume(PRETRAIN, place)}\n"
        f"Repeat     {PRETRAIN} --config {saved} --output-dir ANOTHER\n"
        f"Sample     python -m train.generate --checkpoint {directory}\n"
        f"Export     python -m train.export --checkpoint {directory} --to hf"
    )
