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
from subtrack_jax.eight_bit import EightBitAdamState
from subtrack_jax.low_rank import LowRank, by_path
from subtrack_jax.matrix_view import MatrixView
from subtrack_jax.memory import state_bytes
from subtrack_jax.monitoring import MonitorEnergyState, monitor_energy
from subtrack_jax.optimizers import (
    grass_jump,
    grass_walk,
    subtrack,
    subtrack_grad,
)
from subtrack_jax.record import LowRankLeaf
from subtrack_jax.recovery import RecoverAndScaleState, recover_and_scale
from subtrack_jax.rotation import DenseRotation, RankOneRotation, Rotation
from subtrack_jax.sharding import state_sharding
from subtrack_jax.svd_optimizers import fira, galore
from subtrack_jax.trackers import Tracker, geodesic, random_jump, random_walk, svd
from subtrack_jax.tracking import TrackSubspaceState, track_subspace
from subtrack_jax.transport import transport_adam, transport_momentum

__all__ = [
    "DenseRotation",
    "EightBitAdamState",
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
    "by_path",
    "diagnostics",
    "fira",
    "galore",
    "geodesic",
    "grass_jump",
    "grass_walk",
    "grassmann",
    "monitor_energy",
    "on_coordinates",
    "project",
    "random_jump",
    "random_walk",
    "recover_and_scale",
    "scale_by_projection_aware_adam",
    "state_bytes",
    "state_sharding",
    "subtrack",
    "subtrack_grad",
    "svd",
    "track_subspace",
    "transport_adam",
    "transport_momentum",
]
