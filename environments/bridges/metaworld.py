"""Meta-World's tasks one by one: its registry has one id for all of them, which takes the task as an option."""

import gymnasium


def register():
    """Puts each task into the registry under its own name."""
    import metaworld

    for name in metaworld.ALL_V3_ENVIRONMENTS:
        options = {"id": "Meta-World/MT1", "env_name": name}
        gymnasium.register(name, entry_point="gymnasium:make", kwargs=options, max_episode_steps=500)
