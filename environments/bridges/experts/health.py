"""The clinical rules that the health libraries ship: textbook protocols, some of which count what they have done."""

import importlib
import inspect
import os
import sys
import types
import typing

import numpy as np

# The module and the name of each rule, by the beginnings of ids; functions of the observation are in tables by id.
_RULES = {
    "anesthesim/": ("heuristic", "HEURISTIC_MAP"),
    "nephrosim/": ("heuristic", "HEURISTIC_MAP"),
    "ventisim/": ("heuristic", "HEURISTIC_MAP"),
    "antibiosim/": ("heuristic_agent", "HeuristicAgent"),
    "sepsisim/": ("heuristic_agent", "HeuristicAgent"),
    "woundsim/": ("heuristic", "HeuristicAgent"),
    "cardiosim/PacingControl": ("heuristic", "HeuristicPacingAgent"),
    "cardiosim/AntiarrhythmicDosing": ("heuristic", "HeuristicDosingAgent"),
    "glucosim/BasalControl": ("heuristic", "HeuristicBasalAgent"),
    "glucosim/BolusAdvisor": ("heuristic", "HeuristicBolusAgent"),
    "hemosim/WarfarinDosing": ("baselines", "WarfarinClinicalBaseline"),
    "hemosim/HeparinInfusion-v0": ("baselines", "HeparinRaschkeBaseline"),
    "hemosim/DOACManagement": ("baselines", "DOACGuidelineBaseline"),
    "hemosim/DICManagement": ("baselines", "DICProtocolBaseline"),
    "immunosim/CheckpointInhibitor": ("heuristic_agent", "CheckpointInhibitorHeuristic"),
    "immunosim/CombinationTherapy": ("heuristic_agent", "CombinationTherapyHeuristic"),
    "immunosim/CARTCell": ("heuristic_agent", "CARTCellHeuristic"),
    "immunosim/AdaptiveDosing": ("heuristic_agent", "AdaptiveDosingHeuristic"),
    "oncosim/BeamSelection": ("heuristic_agent", "BeamSelectionHeuristic"),
    "oncosim/DoseFractionation": ("heuristic_agent", "DoseFractionationHeuristic"),
    "oncosim/AdaptiveRT": ("heuristic_agent", "AdaptiveRTHeuristic"),
    "ophthasim/GlaucomaIOP": ("heuristic_agent", "GlaucomaHeuristicAgent"),
    "ophthasim/AntiVEGF": ("heuristic_agent", "AntiVEGFHeuristicAgent"),
    "ophthasim/LaserTrabeculoplasty": ("heuristic_agent", "LaserHeuristicAgent"),
    "ophthasim/DiabeticRetinopathy": ("heuristic_agent", "DRHeuristicAgent"),
    "PeptideGym/AMP": ("heuristic_agent", "HeuristicAMPAgent"),
    "PeptideGym/Cyclic": ("heuristic_agent", "HeuristicCyclicAgent"),
    "PeptideGym/Epitope": ("heuristic_agent", "HeuristicEpitopeAgent"),
}


class ClinicalRule:
    """The rule of one id; a new one for each episode, because some count."""

    def __init__(self, seed):
        self._seed, self._episodes = seed, 0
        self._act: typing.Any = None

    def reset(self, env, obs, info):
        self._episodes += 1
        seed = int(np.random.SeedSequence([self._seed, self._episodes]).generate_state(1)[0])
        self._act = _make(env, seed)

    def label(self, env, obs, info):
        action = self._act(obs)
        action = action[0] if isinstance(action, tuple) else action
        space = env.action_space
        low = getattr(space, "low", None)
        if low is None:
            return action
        return np.clip(np.asarray(action, space.dtype).reshape(space.shape), low, space.high)

    def observe(self, action, obs, reward, end, info):
        pass


def _make(env, seed):
    """The function from observations to actions of an id's rule."""
    id = env.spec.id
    module, name = next(rule for start, rule in _RULES.items() if id.startswith(start))
    found = getattr(_load(id.partition("/")[0].lower(), module), name)
    if isinstance(found, dict):
        return found[id]
    wanted = inspect.signature(found).parameters
    agent = found(**{name: value for name, value in {"env": env, "env_id": id, "seed": seed}.items() if name in wanted})
    return agent.act if hasattr(agent, "act") else agent.predict


def _load(library, name):
    """A module of a library's agents, without the trained ones beside it, whose packages are not installed."""
    package = f"{library}.agents"
    if package not in sys.modules:
        home: typing.Any = importlib.import_module(library)
        folder = os.path.join(os.path.dirname(home.__file__), "agents")
        stub = sys.modules[package] = types.ModuleType(package)
        stub.__path__ = [folder]
    return importlib.import_module(f"{package}.{name}")


EXPERTS = {"rule": ClinicalRule}
