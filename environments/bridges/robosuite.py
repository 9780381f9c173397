"""robosuite's tasks, each with Panda arms and seen as numbers, not as pictures."""

import gymnasium

_PICTURES = ("has_renderer", "has_offscreen_renderer", "use_camera_obs")
_HORIZON = 1000  # steps, robosuite's own


class Task(gymnasium.Env):
    """One task; where things lie is drawn anew at every reset.

    Args:
      name: robosuite's own.
      seed: of all episodes: robosuite takes it here and nowhere else.
    """

    def __init__(self, name, seed=None):
        import robosuite
        from robosuite.wrappers.gym_wrapper import GymWrapper

        robots = ["Panda"] * (2 if name.startswith("TwoArm") else 1)
        # Without pictures; and it would call the end of its time an end of the task.
        options = {**dict.fromkeys(_PICTURES, False), "ignore_done": True, "hard_reset": False}
        self._inner = GymWrapper(robosuite.make(name, robots=robots, seed=seed, **options))
        self.observation_space, self.action_space = self._inner.observation_space, self._inner.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._inner.reset()

    def step(self, action):
        return self._inner.step(action)

    def close(self):
        self._inner.close()


def register():
    """Puts each task into the registry under its own name."""
    import robosuite

    for name in robosuite.ALL_ENVIRONMENTS:
        gymnasium.register(name, entry_point=f"{__name__}:Task", kwargs={"name": name}, max_episode_steps=_HORIZON)
