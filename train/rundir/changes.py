"""Changed settings of a resumed run: comparison, rules, history file."""

import contextlib
import dataclasses
import datetime
import difflib
import enum
import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from train.config.rules import flag
from train.system import files

HISTORY_FILE = "config-history.jsonl"

# Saved value and new value by the setting's name in config.json, e.g. optimizer.b2.
Changes = dict[str, tuple[Any, Any]]


class May(enum.Enum):
    """Permission to change a setting of a run."""

    FREELY = enum.auto()  # results stay the same within rounding
    GROW = enum.auto()  # increases freely, decreases if allowed
    IF_ALLOWED = enum.auto()  # with --allow-changes: results change
    NEVER = enum.auto()  # the checkpoints would not be usable


# (pattern of the setting's name, permission, reason if never); the first match decides.
RULES: tuple[tuple[str, May, str], ...] = (
    # Output, reports, and intervals of evaluation and checkpoints.
    (r"output_dir|(checkpoint|report|sample)\..*", May.FREELY, ""),
    (r"eval_every_steps|max_skipped_steps_in_a_row", May.FREELY, ""),
    # Fine-tuning: passes over the data are steps once it is known.
    (r"epochs|eval_every_epochs|patience_evals", May.FREELY, ""),
    # Ways to compute the same results.
    (
        r"mesh|gradient_accumulation_steps|(model\.)?remat|update_in_backward",
        May.FREELY,
        "",
    ),
    (r"data\.(token_cache_dir|skip_bad_documents)", May.FREELY, ""),
    (r"data\.eval_batch_size_examples", May.FREELY, ""),
    (r"model\.max_length_tokens", May.FREELY, ""),  # used by exports only
    (r"steps", May.GROW, ""),
    (r"preset", May.NEVER, "give the settings themselves"),
    (
        r"init_from|resize_embedding|new_head|model\.init_std",
        May.NEVER,
        "weights come from the checkpoint",
    ),
    (r"data\.(tokenizer|bos|bos_and_eos)", May.NEVER, "weights know but one tokenizer"),
    (r"data\.template", May.NEVER, "answers end as the template says"),
    (r"data\.task", May.NEVER, "the model's head is that of one task"),
    (r"freeze", May.NEVER, "the optimizer's state has another shape"),
    (r"model\.\w*dropout", May.FREELY, ""),  # follows from --dropout
    (r"model\.(dtype|norm_epsilon|rotary_.*)", May.IF_ALLOWED, ""),
    (r"model\..*", May.NEVER, "the checkpoint has weights of another form"),
    # `settings_of_state` finds those among them that change the optimizer's state.
    (r".*", May.IF_ALLOWED, ""),
)

# Changing one of these invalidates the checkpoint's position in the data, so the
# training text is read from its beginning again.
_OTHER_ROWS = re.compile(
    r"seed|data\.(data_glob|dataset|dataset_config|dataset_split|text_field"
    r"|shuffle_buffer_documents|held_out_fraction|packing|sequence_length_tokens"
    r"|train_file|dataset_revision|pair_field|label_field|max_length_tokens"
    r"|length_buckets|batch_size_examples|format|skip_bad_rows|loss_on)"
)

_OWN_FILES = ("data.eval_glob", "data.validation_file")

# Settings of the held-out text; _HELD_OUT if it is split from the training text.
_EVALUATION = re.compile(
    r"data\.(eval_glob|eval_tokens|packing|sequence_length_tokens|validation_file"
    r"|pair_field|label_field|max_length_tokens|loss_on)"
)
_HELD_OUT = re.compile(
    r"data\.(data_glob|dataset|dataset_config|dataset_eval_split|text_field"
    r"|held_out_fraction|train_file|dataset_revision|format|skip_bad_rows)"
)


def find(config: Any, saved: Any) -> Changes:
    """Finds the settings in which a config differs from a saved one.

    Compares resolved optimizers: explicit defaults and settings that the method does
    not read are not differences. Settings of the process (`start`) are ignored.
    """
    before, now = (flat_values(dataclasses.asdict(each)) for each in (saved, config))
    meant, meant_now = (flat_values(_resolved(each)) for each in (saved, config))
    return {
        name: (meant[name], meant_now[name])
        for name in meant_now
        # Equal values may resolve differently under another method.
        if before[name] != now[name] and meant[name] != meant_now[name]
    }


def check(
    changes: Changes,
    allowed: Collection[str],
    same_files: Collection[str] = (),
    of_state: Collection[str] = (),
) -> None:
    """Raises a ValueError that lists the changes which are not permitted.

    Args:
      changes: from `find`.
      allowed: settings given to --allow-changes.
      same_files: settings whose new values refer to the same files.
      of_state: settings that change the shape of the optimizer's state.
    """
    refused, to_allow, advice = [], [], "Give its values to continue it"
    for name, change in changes.items():
        may, reason = _rule(name, change)
        if name in of_state:
            may, reason = May.NEVER, "the optimizer's state has another shape"
        if may is May.FREELY or name in same_files:
            continue
        if may is May.NEVER:
            refused.append(f"{told(name, change)}, which cannot change: {reason}")
        elif name not in allowed:
            refused.append(told(name, change))
            to_allow.append(name)
    if to_allow:
        names = ",".join([*allowed, *to_allow])
        advice += f", --allow-changes {names} to continue it with these"
    if refused:
        raise ValueError(f"{'; '.join(refused)}. {advice}, or another directory")


def told(name: str, change: tuple[Any, Any]) -> str:
    """Formats a change as "--flag 1 here, 2 there"."""
    before, now = change
    return f"{flag(name)} {now} here, {before} there"


def allowed_names(text: str | None, config: Any) -> list[str]:
    """Parses `--allow-changes`: names in config.json or flags.

    Raises:
      ValueError: the config has no such setting.

    >>> from train.config.presets import PRESETS
    >>> allowed_names("optimizer.b2,z-loss-weight", PRESETS["tiny"])
    ['optimizer.b2', 'z_loss_weight']
    """
    known = flat_values(dataclasses.asdict(config))
    by_flag = {flag(name): name for name in known}
    names = []
    for each in text.split(",") if text else []:
        plain = each.strip().removeprefix("--")
        name = plain if plain in known else by_flag.get(flag(plain))
        if name is None:
            close = difflib.get_close_matches(plain, [*known, *by_flag], 1)
            advice = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"--allow-changes {text}: config.json has no setting {plain!r}{advice}"
            )
        names.append(name)
    return names


def reads_other_rows(changes: Changes) -> bool:
    """Whether the training text must be read from its beginning again."""
    return any(
        # Adding or removing these moves rows between training and evaluation.
        None in change if name in _OWN_FILES else _OTHER_ROWS.fullmatch(name)
        for name, change in changes.items()
    )


def evaluates_other_text(changes: Changes, *, has_own_files: bool) -> bool:
    """Whether new held-out losses are not comparable with earlier ones.

    Args:
      changes: from `find`, without files that were only moved.
      has_own_files: whether the evaluation has its own files.
    """
    return any(
        _EVALUATION.fullmatch(name) or (_HELD_OUT.fullmatch(name) and not has_own_files)
        for name in changes
    )


def evaluation_start(directory: pathlib.Path) -> int:
    """Step after which held-out losses are of the current text; -1: all are."""
    path = directory / HISTORY_FILE
    starts = [-1]
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            if row["evaluates_other_text"]:
                starts.append(int(row["step"]))
    return max(starts)


def append_history(
    directory: pathlib.Path, changes: Changes, step: int, *, evaluates_other_text: bool
) -> None:
    """Appends changes to a run's config history, with the step after which they apply.

    Raises:
      OSError: the file cannot be written.
    """
    if not changes:
        return
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "changes": {
            name: {"from": before, "to": now} for name, (before, now) in changes.items()
        },
        "evaluates_other_text": evaluates_other_text,
    }
    files.append_lines(directory / HISTORY_FILE, json.dumps(row) + "\n")


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to dotted names; paths become absolute strings.

    >>> flat_values({"steps": 3, "optimizer": {"b1": 0.9, "b2": None}})
    {'steps': 3, 'optimizer.b1': 0.9, 'optimizer.b2': None}
    """
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flat_values(value, f"{prefix}{name}.")
        else:
            is_path = isinstance(value, pathlib.Path)
            flat[prefix + name] = str(value.absolute()) if is_path else value
    return flat


def _rule(name: str, change: tuple[Any, Any]) -> tuple[May, str]:
    may, reason = next(
        (may, reason) for names, may, reason in RULES if re.fullmatch(names, name)
    )
    if may is May.GROW:
        before, now = change
        may = May.FREELY if now > before else May.IF_ALLOWED
    return may, reason


def _resolved(config: Any) -> dict[str, Any]:
    """Values of a config with the optimizer's defaults resolved."""
    from train.config.methods import resolved  # imports JAX, which is slow

    values = dataclasses.asdict(config)
    values.pop("start", None)
    if "optimizer" in values:
        values["optimizer"] = dataclasses.asdict(resolved(config.optimizer))
    return values
