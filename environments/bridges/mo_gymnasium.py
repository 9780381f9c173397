"""MO-Gymnasium with one reward: the sum of its objectives, each with the weight one."""

import gymnasium


def register():
    """Lets the library's own wrapper weigh the rewards of each of its environments."""
    from mo_gymnasium.wrappers import LinearReward

    for entry in gymnasium.registry.values():
        if str(entry.entry_point).startswith("mo_gymnasium"):
            entry.additional_wrappers += (LinearReward.wrapper_spec(),)
