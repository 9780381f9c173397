"""simglucose's virtual patients with diabetes, one id each; every episode is another day of theirs."""

import typing

import gymnasium

_PATIENTS = [f"{age}#{number:03}" for age in ("adolescent", "adult", "child") for number in range(1, 11)]


class Patient(gymnasium.Env):
    """One patient: the blood glucose is seen, the basal insulin is chosen.

    Args:
      name: simglucose's own name of the patient.
    """

    def __init__(self, name):
        self._name = name
        self._day: typing.Any = self._make(0)
        self.observation_space, self.action_space = self._day.observation_space, self._day.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # Meals, the sensor's noise and the state at the start are drawn when it is made.
        self._day = self._make(int(self.np_random.integers(1 << 31)))
        return self._day.reset()

    def step(self, action):
        return self._day.step(float(action[0]))

    def _make(self, seed):
        from simglucose import envs

        return envs.T1DSimGymnaisumEnv(patient_name=self._name, seed=seed)


def register():
    """Puts the thirty patients into the registry."""
    for name in _PATIENTS:
        identifier = f"simglucose-{name.replace('#', '-')}-v0"
        gymnasium.register(identifier, entry_point=f"{__name__}:Patient", kwargs={"name": name})
