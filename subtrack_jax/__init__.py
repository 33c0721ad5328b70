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
"""

from subtrack_jax import diagnostics, grassmann
from subtrack_jax._version import __version__
from subtrack_jax.coordinates import (
    on_coordinates,
    project,
    scale_by_projection_aware_adam,
)
from subtrack_jax.dimension_numbers import by_path
from subtrack_jax.drawing import DrawProjectionState, draw_projection, gaussian
from subtrack_jax.eight_bit import EightBitAdamState
from subtrack_jax.feedback import FeedBackState, feed_back
from subtrack_jax.iterative_optimizers import ldadam, online_subspace_descent
from subtrack_jax.iterative_trackers import online_pca, power_iteration
from subtrack_jax.low_rank import LowRank
from subtrack_jax.matrix_view import MatrixView
from subtrack_jax.memory import state_bytes
from subtrack_jax.monitoring import MonitorEnergyState, monitor_energy
from subtrack_jax.optimizers import subtrack, subtrack_grad
from subtrack_jax.random_optimizers import apollo, apollo_mini, grass_jump, grass_walk
from subtrack_jax.record import LowRankLeaf
from subtrack_jax.recovery import (
    RecoverAndScaleState,
    recover_and_scale,
    scale_gradient,
)
from subtrack_jax.rotation import DenseRotation, RankOneRotation, Rotation
from subtrack_jax.sharding import state_sharding
from subtrack_jax.svd_optimizers import fira, galore, golore
from subtrack_jax.trackers import (
    Tracker,
    geodesic,
    random_jump,
    random_walk,
    svd,
    switch,
)
from subtrack_jax.tracking import TrackSubspaceState, track_subspace
from subtrack_jax.transport import transport_adam, transport_momentum

__all__ = [
    "DenseRotation",
    "DrawProjectionState",
    "EightBitAdamState",
    "FeedBackState",
    "LowRank",
    "LowRankLeaf",
    "MatrixView",
    "MonitorEnergyState",
    "RankOneRotation",
    "RecoverAndScaleState",
    "Rotation",
    "TrackSubspaceState",
    "Tracker",
    "__version__",
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
]
