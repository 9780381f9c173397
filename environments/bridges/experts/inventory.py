"""Inventories: orders up to a base stock, and the order of a newsvendor whose expected profit is the largest."""

import numpy as np


class BaseStock:
    """Orders each stage's stock, with what is on its way, up to the demand until the next order arrives.

    What would arrive too late to be sold is not ordered.
    """

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        self._period = 0

    def label(self, env, obs, info):
        chain = env.unwrapped
        place = self._period
        late = np.cumsum(chain.lead_time)
        stock = chain.I[place] + chain.T[place] - (chain.B[place - 1, :-1] if place else 0)
        left = chain.num_periods - place
        demand = float(chain.dist_param["mu"])
        wanted = demand * np.minimum(late + 1, left) + np.sqrt(demand * (late + 1))
        order = np.where(left > late, wanted - np.cumsum(stock), 0)
        space = env.action_space
        return np.clip(np.round(order), space.low, space.high).astype(space.dtype)

    def observe(self, action, obs, reward, end, info):
        self._period += 1


class Newsvendor:
    """Always the same order, the best by the distribution of demand, until what is ordered would come too late."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        self._period = 0
        price, cost, holding, penalty, mean = map(float, obs[:5])
        pays_by_excess = env.spec.id.startswith("Newsvendor")
        self._order = _best_order(price, cost, holding, penalty, mean, pays_by_excess=pays_by_excess)

    def label(self, env, obs, info):
        shop = env.unwrapped
        goes_on = self._period + shop.lead_time < shop.step_limit
        return np.array([self._order * goes_on], env.action_space.dtype)

    def observe(self, action, obs, reward, end, info):
        self._period += 1


def _best_order(price, cost, holding, penalty, mean, *, pays_by_excess):
    """The order of the largest expected profit of a period; or-gymnasium's price of it grows with what is left over."""
    from scipy import stats

    orders = np.arange(int(mean + 6 * np.sqrt(mean) + 2))
    demand = stats.poisson(mean)
    # Expected excess, of which each unit of order adds what the demand is at most.
    excess = np.concatenate([[0.0], np.cumsum(demand.cdf(orders[:-1]))])
    sales = orders - excess
    paid = orders * cost * (excess if pays_by_excess else 1.0)
    return int(np.argmax(price * sales - paid - holding * excess - penalty * (mean - sales)))


EXPERTS = {"base-stock": BaseStock, "newsvendor": Newsvendor}
