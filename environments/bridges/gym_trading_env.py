"""gym-trading-env on markets that are drawn here, because it brings no prices: one id for each kind of market.

A market is 20,000 hours of a geometric random walk, always the same one for a kind: its drift follows the last hours
(trending), pulls back to a slowly moving value (reverting), or depends on the hour of the day (seasonal). What is seen
are returns over 1, 5 and 20 hours, the volatility of the last 20, and the hour. An episode is 500 hours from a random
start; the agent is short, out or long, and pays 0.05 % of what it trades.
"""

import warnings

import gymnasium
import numpy as np

_HOURS = 20_000
_EPISODE = 500
_KINDS = ("trending", "reverting", "seasonal")


def prices(kind):
    """The market of a kind, a table with a line for each hour."""
    import pandas

    random = np.random.default_rng(_KINDS.index(kind))
    shocks = 0.004 * random.standard_normal(_HOURS)
    log_price, anchor, trend = np.zeros(_HOURS), 0.0, 0.0
    for t in range(1, _HOURS):
        trend = 0.95 * trend + 0.1 * (shocks[t - 1] if kind == "trending" else 0.0)
        anchor += 0.0005 * random.standard_normal()
        pull = 0.05 * (anchor - log_price[t - 1]) if kind == "reverting" else 0.0
        hour = 0.002 * np.sin(2 * np.pi * t / 24) if kind == "seasonal" else 0.0
        log_price[t] = log_price[t - 1] + trend + pull + hour + shocks[t]
    hours = pandas.date_range("2020-01-01", periods=_HOURS, freq="h")
    close = pandas.Series(100 * np.exp(log_price), hours)
    table = pandas.DataFrame({"open": close.shift(1), "close": close})
    table["high"] = table[["open", "close"]].max(axis=1)
    table["low"] = table[["open", "close"]].min(axis=1)
    steps = np.log(close).diff()
    for width in (1, 5, 20):
        table[f"feature_return_{width}"] = np.log(close).diff(width)
    table["feature_volatility"] = steps.rolling(20).std()
    table["feature_sine"] = np.sin(2 * np.pi * hours.hour / 24)
    table["feature_cosine"] = np.cos(2 * np.pi * hours.hour / 24)
    return table.dropna()


def make_market(kind):
    """The trading environment on the market of a kind."""
    from gym_trading_env.environments import TradingEnv

    warnings.filterwarnings("default")  # the library turns every warning of the interpreter into an error
    return TradingEnv(
        prices(kind), positions=[-1, 0, 1], trading_fees=0.0005, max_episode_duration=_EPISODE, verbose=0, name=kind
    )


def register():
    """Puts one environment for each kind of market into the registry."""
    for kind in _KINDS:
        gymnasium.register(f"TradingEnv-{kind}", entry_point=f"{__name__}:make_market", kwargs={"kind": kind})
