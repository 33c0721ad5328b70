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
from subtrack_jax._internal.dimension_numbers import by_path
from subtrack_jax._internal.eight_bit import EightBitAdamState
from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.state_bytes import state_bytes
from subtrack_jax._version import __version__
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.galore import fira, galore, golore
from subtrack_jax.optimizers.iterative import ldadam, online_subspace_descent
from subtrack_jax.optimizers.iterative_trackers import online_pca, power_iteration
from subtrack_jax.optimizers.random import apollo, apollo_mini, grass_jump, grass_walk
from subtrack_jax.optimizers.subtrack import subtrack, subtrack_grad
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
from subtrack_jax.stages.trackers import geodesic, random_jump, random_walk, svd
from subtrack_jax.stages.transport import (
    DenseRotation,
    RankOneRotation,
    Rotation,
    transport_adam,
    transport_momentum,
)

__all__ = [
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
