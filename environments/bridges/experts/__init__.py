"""Experts that run beside the simulators of their libraries: one module per library, see `catalog/expert_lists`.

A module here is loaded by the worker program, in the library's own interpreter, as a bridge is: it may import the
standard library, numpy, and inside its functions the library. Its table `EXPERTS` has the class of each expert by name:

  `__init__(seed)`: a new one, whenever its row is seeded;
  `reset(env, obs, info)`: an episode has begun, with what the library's `reset` returned;
  `label(env, obs, info)`: what to do now, in the library's own action space, or None where it does not know;
  `observe(action, obs, reward, end, info)`: this action was executed, whoever chose it, and this came of it;

and, if it likes, `key(env, obs, info)`, all that its label follows from, so that a label is found once for each state,
and `draws = True`, where it draws from `random`, `np.random` or the environment's own generator: it then has states of
its own of the first two, and the last is put back. An expert must not change the environment.
"""
