"""PyFlyt's way points as numbers: its environments return a sequence of all that are left, this the next two."""

import gymnasium

_NEXT = gymnasium.envs.registration.WrapperSpec(
    "FlattenWaypointEnv", "PyFlyt.gym_envs:FlattenWaypointEnv", {"context_length": 2}
)


def register():
    """Lets the library's own wrapper look at the way points."""
    for id, entry in gymnasium.registry.items():
        if id.startswith("PyFlyt/") and "Waypoints" in id:
            entry.additional_wrappers += (_NEXT,)
