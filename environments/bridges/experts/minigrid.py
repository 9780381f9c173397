"""BabyAI's bot, which MiniGrid ships: it sees what the agent has seen, and plans by shortest paths among subgoals.

It follows whoever acts as long as it is told what was done. It gives up where a box has been opened, because it does
not remember what was in it.
"""


class BabyAIBot:
    """The bot of one row; it has no answer for the rest of an episode in which it has given up."""

    def __init__(self, seed):
        self._bot = None
        self._action = None

    def reset(self, env, obs, info):
        from minigrid.utils.baby_ai_bot import BabyAIBot as Bot

        self._bot, self._action = Bot(env), None

    def label(self, env, obs, info):
        if self._bot is None:
            return None
        try:
            return int(self._bot.replan(self._action))
        except Exception:
            # It asserts what its authors thought impossible; what it believes is then no longer so.
            self._bot = None
            return None

    def observe(self, action, obs, reward, end, info):
        from minigrid.core.actions import Actions

        self._action = Actions(int(action))


EXPERTS = {"babyai-bot": BabyAIBot}
