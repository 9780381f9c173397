"""Times the training of gymnax's CartPole by rejax's PPO, compilation apart; run by an interpreter that has it.

Its only argument is JSON, the settings that both sides share. It prints the environment steps of training and the
seconds that they took.
"""

import json
import sys
import time

import jax
from rejax import PPO


def main(num_envs, rollout_length, epochs, minibatches, learning_rate, hidden, steps):
    """Trains twice, which compiles once, and times the second."""
    algorithm = PPO.create(
        env="CartPole-v1",
        agent_kwargs={"hidden_layer_sizes": tuple(hidden), "activation": "tanh"},
        num_envs=num_envs,
        num_steps=rollout_length,
        num_epochs=epochs,
        num_minibatches=minibatches,
        learning_rate=learning_rate,
        normalize_observations=True,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
    )
    algorithm = algorithm.replace(eval_callback=lambda *_: ())  # evaluation is not training
    train = jax.jit(algorithm.train)
    jax.block_until_ready(train(jax.random.PRNGKey(0)))
    began = time.perf_counter()
    state, _ = jax.block_until_ready(train(jax.random.PRNGKey(1)))
    print(json.dumps({"steps": int(state.global_step), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
