"""Low-rank optimizers whose subspace is tracked on the Grassmannian.

SubTrack++, its siblings and the methods they are measured against, as optax
transformations. Start with `subtrack`; build your own from the four stages:

1. `track_subspace` gives every low-rank gradient G a basis S;
2. `project` adds its coordinates A = S^T G;
3. `scale_by_projection_aware_adam`, or any rule through `on_coordinates`, turns
   them into a direction N;
4. `recover_and_scale` lifts N back and adds what the subspace missed.

`LowRank` says which leaves, axes and rank. Between stages a low-rank leaf is a
`LowRankLeaf` record; every other leaf is the plain array that it was.

`update_in_backward` builds a training step that runs any optimizer in the backward
pass, with one layer's gradient in memory at a time.
"""

from subtrack_jax import diagnostics, grassmann
from subtrack_jax._internal.backward_step import BackwardUpdate
from subtrack_jax._internal.dimension_numbers import by_path
from subtrack_jax._internal.eight_bit import EightBitAdamState
from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.state_bytes import state_bytes
from subtrack_jax._version import __version__
from subtrack_jax.backward import update_in_backward
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.apollo import apollo, apollo_mini
from subtrack_jax.optimizers.fira import fira
from subtrack_jax.optimizers.galore import galore, svd
from subtrack_jax.optimizers.golore import golore
from subtrack_jax.optimizers.grass import (
    grass_jump,
    grass_walk,
    random_jump,
    random_walk,
)
from subtrack_jax.optimizers.ldadam import ldadam, power_iteration
from subtrack_jax.optimizers.online_subspace_descent import (
    online_pca,
    online_subspace_descent,
)
from subtrack_jax.optimizers.orthogonal_subtrack import orthogonal_subtrack
from subtrack_jax.optimizers.subtrack import geodesic, subtrack, subtrack_grad
from subtrack_jax.sharding import state_sharding
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.draw_projection import (
    DrawProjectionState,
    draw_projection,
    gaussian,
)
from subtrack_jax.stages.feed_back import FeedBackState, feed_back
from subtrack_jax.stages.monitor import MonitorEnergyState, monitor_energy
from subtrack_jax.stages.on_coordinates import on_coordinates
from subtrack_jax.stages.project import project
from subtrack_jax.stages.record import LowRankLeaf
from subtrack_jax.stages.recover import (
    RecoverAndScaleState,
    recover_and_scale,
    scale_gradient,
)
from subtrack_jax.stages.track import TrackSubspaceState, track_subspace
from subtrack_jax.stages.tracker import Moved, Tracker, TrackerContext, switch
from subtrack_jax.stages.transport import (
    DenseRotation,
    RankOneRotation,
    Rotation,
    transport_adam,
    transport_momentum,
)

__all__ = [
    "BackwardUpdate",
    "DenseRotation",
    "DrawProjectionState",
    "EightBitAdamState",
    "FeedBackState",
    "LowRank",
    "LowRankLeaf",
    "MatrixView",
    "MonitorEnergyState",
    "Moved",
    "RankOneRotation",
    "RecoverAndScaleState",
    "Rotation",
    "TrackSubspaceState",
    "Tracker",
    "TrackerContext",
    "__version__",
    "adam_in_subspace",
    "apollo",
    "apollo_mini",
    "by_path",
    "diagnostics",
    "draw_projection",
    "feed_back",
    "fira",
    "galore",
    "gaussian",
    "geodesic",
    "golore",
    "grass_jump",
    "grass_walk",
    "grassmann",
    "ldadam",
    "monitor_energy",
    "on_coordinates",
    "online_pca",
    "online_subspace_descent",
    "orthogonal_subtrack",
    "power_iteration",
    "project",
    "random_jump",
    "random_walk",
    "recover_and_scale",
    "scale_by_projection_aware_adam",
    "scale_gradient",
    "state_bytes",
    "state_sharding",
    "subtrack",
    "subtrack_grad",
    "svd",
    "switch",
    "track_subspace",
    "transport_adam",
    "transport_momentum",
    "update_in_backward",
]
