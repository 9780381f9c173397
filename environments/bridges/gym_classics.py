"""Gym Classics, the tables of the textbooks: its environments are registered by a call, not by an import."""


def register():
    """Puts them into the registry."""
    import gym_classics

    gym_classics.register("gymnasium")
