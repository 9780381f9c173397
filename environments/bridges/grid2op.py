"""Grid2Op's power grids, with the days that the package brings: flows and states of lines are seen, switches chosen.

On grids of up to 14 substations an action connects the elements of one substation to its buses or switches one line;
larger ones have tens of thousands of such actions, there it switches one line or redispatches one generator.
"""

import typing
import warnings

import gymnasium

_SMALL = 14  # substations
_SEEN = (
    *("gen_p", "load_p", "load_q", "rho", "line_status", "timestep_overflow", "topo_vect"),
    *("time_before_cooldown_line", "time_before_cooldown_sub"),
)
# Multi-mix ones and those whose days are not in the package are left out.
_GRIDS = (
    *("educ_case14_redisp", "educ_case14_storage", "l2rpn_case14_sandbox", "l2rpn_icaps_2021", "l2rpn_idf_2023"),
    *("l2rpn_neurips_2020_track1", "l2rpn_wcci_2020", "l2rpn_wcci_2022_dev", "rte_case118_example"),
    *("rte_case14_opponent", "rte_case14_realistic", "rte_case14_redisp", "rte_case14_test", "rte_case5_example"),
)


def make_grid(name):
    """The grid of a name as a Gymnasium environment."""
    import grid2op
    from grid2op import gym_compat

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid: typing.Any = grid2op.make(name, test=True)
        environment: typing.Any = gym_compat.GymEnv(grid)
        chosen = ["set_line_status_simple", "set_bus" if grid.n_sub <= _SMALL else "redispatch"]
        environment.observation_space = gym_compat.BoxGymObsSpace(grid.observation_space, attr_to_keep=list(_SEEN))
        environment.action_space = gym_compat.DiscreteActSpace(grid.action_space, attr_to_keep=chosen)
    return environment


def register():
    """Puts the grids into the registry."""
    for name in _GRIDS:
        gymnasium.register(name, entry_point=f"{__name__}:make_grid", kwargs={"name": name})
