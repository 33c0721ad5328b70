"""Training set-up: optimizer, schedule, shardings and compiled step of a program."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from models import parameters
from models.encoder import Encoder
from models.llama import Llama, LlamaConfig
from models.parameters import MakeModule
from train.config.finetune_config import FinetuneConfig
from train.config.pretrain_config import PretrainConfig
from train.config.sft_config import SftConfig
from train.step import backward_step, optimizers, placement, train_step
from train.step.encoder_task import TaskLoss, without_frozen
from train.step.language_model import AnswerLoss, NextTokenLoss
from train.step.train_state import TrainState, abstract_state, initial_state
from train.step.train_step import Batch, LossFunction, TrainStep


@dataclasses.dataclass(frozen=True, eq=False)
class TrainSetup:
    """Training set-up: optimizer state, shardings and compiled step, from one config.

    Attributes:
      make: builds the model from `rngs`.
      loss_sums: its loss, see `train_step.LossSums`.
      optimizer: the optimizer.
      schedule: its learning rate over the steps.
      mesh: the devices; None: the default device.
      gradient_accumulation_steps: micro-batches of a step.
      max_gradient_norm: gradients are scaled down to this global norm.
      seed: seed of dropout.
      update_in_backward: each layer is updated in the backward pass; the loss needs a
        method `layered`, see `backward_step.LayeredLoss`.
      separate_update: gradient and update are compiled apart, for batches of several
        shapes.
    """

    make: MakeModule
    loss_sums: LossFunction
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh | None = None
    gradient_accumulation_steps: int = 1
    max_gradient_norm: float = math.inf
    seed: int = 0
    update_in_backward: bool = False
    separate_update: bool = False

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, with shardings if there is a mesh."""
        state = abstract_state(parameters.abstract(self.make), self.optimizer)
        if self.mesh is None:
            return state
        params = placement.param_shardings(self.make, self.mesh)
        return placement.placed_state(state, self.optimizer, params, self.mesh)

    @property
    def state_shardings(self) -> TrainState | None:
        """Shardings of the state; None without a mesh."""
        return self.mesh and placement.shardings_of(self.abstract_state)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        """The compiled step, see `train_step.make_train_step`."""
        if self.update_in_backward:
            return backward_step.make_backward_step(
                self.loss_sums.layered(),
                self.optimizer,
                self.schedule,
                self.gradient_accumulation_steps,
                self.state_shardings,
                self.max_gradient_norm,
            )
        return train_step.make_train_step(
            self.loss_sums,
            self.optimizer,
            self.schedule,
            self.gradient_accumulation_steps,
            self.state_shardings,
            self.max_gradient_norm,
            self.seed,
            separate_update=self.separate_update,
        )

    @functools.cached_property
    def _create(self) -> Callable[[jax.Array], TrainState]:
        return jax.jit(
            lambda key: initial_state(
                parameters.initial(self.make, key), self.optimizer
            ),
            out_shardings=self.state_shardings,
        )

    def create_state(self, key: jax.Array) -> TrainState:
        """Initial state with random parameters."""
        return self._create(key)

    def create_state_of(self, params: Any) -> TrainState:
        """Initial state with given parameters, nested dictionaries of arrays."""
        shardings = self.state_shardings
        params = jax.device_put(params, shardings and shardings.params)
        create = lambda params: initial_state(params, self.optimizer)
        return jax.jit(create, out_shardings=shardings)(params)

    def place(self, batch: Batch) -> Batch:
        """Batch on the devices; each process gives its own rows."""
        if self.mesh is None:
            return jax.device_put(batch)
        return placement.place_batch(batch, self.mesh)

    def begin_evaluation(
        self, params: Any, batches: Iterable[Batch]
    ) -> Callable[[], float]:
        """Dispatches an evaluation; the returned function waits for its mean loss."""
        placed = map(self.place, batches)
        return train_step.begin_evaluation(self.loss_sums, params, placed)


def llama_setup(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    z_loss_weight: float = 0.0,
    **settings: Any,
) -> TrainSetup:
    """Set-up of a LLaMA that predicts next tokens; settings as in `TrainSetup`."""
    return TrainSetup(
        functools.partial(Llama, model),
        NextTokenLoss(model, z_loss_weight),
        optimizer,
        schedule,
        **settings,
    )


def pretraining(config: PretrainConfig, mesh: Mesh | None = None) -> TrainSetup:
    """Set-up of `train.pretrain` with a config."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    return llama_setup(
        config.model,
        optimizers.make_optimizer(
            config.optimizer, schedule, config.seed, steps=config.steps
        ),
        schedule,
        config.z_loss_weight,
        mesh=mesh,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        seed=config.seed,
        update_in_backward=config.update_in_backward,
    )


def supervised(config: SftConfig, mesh: Mesh | None = None) -> TrainSetup:
    """Set-up of `train.sft` with a config whose model and steps are known."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    return TrainSetup(
        functools.partial(Llama, config.model),
        AnswerLoss(config.model),
        optimizers.make_optimizer(
            config.optimizer, schedule, config.seed, steps=config.steps
        ),
        schedule,
        mesh=mesh,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        separate_update=True,
    )


def finetuning(config: FinetuneConfig, mesh: Mesh | None = None) -> TrainSetup:
    """Set-up of `train.finetune` with a config whose model and steps are known."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    optimizer = optimizers.make_optimizer(
        config.optimizer, schedule, config.seed, steps=config.steps
    )
    return TrainSetup(
        functools.partial(Encoder, config.model),
        TaskLoss(config.model, config.freeze),
        without_frozen(optimizer, config.freeze),
        schedule,
        mesh=mesh,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        seed=config.seed,
        separate_update=True,
    )
