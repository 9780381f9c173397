"""A policy at work in one environment: a line for each episode, and a video. What `ldm-jax play` shows."""

from __future__ import annotations

import collections.abc
import contextlib
import math
import os
import pathlib
import typing
import warnings

import gymnasium
import jax
import numpy as np

import environments
import ldm_jax
from experiments.report.rollouts import Recorder, draw_frames
from ldm_jax import files
from ldm_jax.acting import Decoding
from ldm_jax.errors import ConfigError
from ldm_jax.evaluation.aggregates import number
from ldm_jax.policy import PolicyError

MOST_FRAMES = 600
"""Steps that a video shows, the first ones."""
_FPS = 20


class VideoError(ldm_jax.LdmError, ValueError):
    """A video that cannot be written, or that there are no pictures for."""


class Watched(typing.NamedTuple):
    """Episodes of one row, in order of time.

    Attributes:
      returns: undiscounted.
      lengths: in steps.
      pictures: whose the pictures of the video are; empty without one.
    """

    returns: list[float]
    lengths: list[int]
    pictures: str = ""


def play_policy(
    id: str, policy_folder: str, episodes: int, seed: int, decoding: Decoding, *, video: str = "", unknown: bool = False
) -> list[str]:
    """Lets a policy act in an environment, one episode after the other, its context carried from each to the next.

    Args:
      id: of the environment; the policy has to have its card, unless `unknown`.
      policy_folder: what `Policy.save` wrote.
      episodes: how many.
      seed: of the episodes and of what is drawn.
      decoding: how actions are taken from their distribution; `card` as the reference was scored.
      video: path of an mp4 file to make of it; empty for none. An environment of Gymnasium renders its own pictures,
        those of others are drawn from what the policy sees.
      unknown: an environment without a card may be played in: one is made of its spaces.

    Returns:
      Lines of text: one for each episode, and one of their mean beside the random policy's and the reference's.

    Raises:
      PolicyError: no policy there, or an environment that it does not know.
      CardError: the environment is not as it was when the policy was trained.
      VideoError: a video cannot be made; said before anything is played where that can be.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}, expected at least 1")
    if video:
        _check_video(pathlib.Path(video))
    policy = ldm_jax.load(policy_folder)
    if not unknown:
        _check_known(policy, id)
    rendered = _rendered(id) if video and id in policy.cards else None
    if rendered is not None:
        with contextlib.closing(rendered):
            watched = _film(policy, rendered, id, episodes, seed, decoding, pathlib.Path(video))
    else:
        with contextlib.closing(environments.make(id, batch_size=1)) as environment:
            watched = _watch(policy, environment, episodes, seed, decoding, video)
    shown = [f"video: {video}, {watched.pictures}, at most {MOST_FRAMES:,} steps"] if video else []
    return [*_table(watched, policy.cards.get(id)), *shown]


def _check_known(policy: ldm_jax.Policy, id: str) -> None:
    """Says that an id is not known before anything is made for it."""
    try:
        policy.card(id)
    except PolicyError as error:
        raise PolicyError(f"{error}: `ldm-jax play --unknown` makes one of its spaces") from error


def _watch(
    policy: ldm_jax.Policy,
    environment: ldm_jax.Environment,
    episodes: int,
    seed: int,
    decoding: Decoding,
    video: str,
) -> Watched:
    """Plays in an environment of ours; a video shows what the policy sees."""
    inside: ldm_jax.Environment = Recorder(environment, MOST_FRAMES) if video else environment
    played = ldm_jax.evaluate(policy, inside, jax.random.key(seed), episodes=episodes, decoding=decoding)
    if isinstance(inside, Recorder):
        frames = draw_frames(environment.spec.observation_space, inside.observations)
        with write_video(pathlib.Path(video)) as show:
            for frame in frames:
                show(frame)
    return Watched(played.returns[0].tolist(), played.lengths[0].tolist(), "drawn from what the policy sees")


def _film(
    policy: ldm_jax.Policy,
    environment: gymnasium.Env,
    id: str,
    episodes: int,
    seed: int,
    decoding: Decoding,
    path: pathlib.Path,
) -> Watched:
    """Plays in a plain environment that renders, and shows its pictures."""
    watched, shown = Watched([], [], "rendered by the environment"), 0
    with write_video(path) as show:
        steps = ldm_jax.play(policy, environment, episodes=episodes, seed=seed, decoding=decoding, card=id)
        for step in steps:
            if shown < MOST_FRAMES:
                show(np.asarray(environment.render()))
                shown += 1
            if step.last:
                watched.returns.append(step.return_so_far)
                watched.lengths.append(step.step)
    return watched


_WITHOUT_A_SCREEN = {"SDL_AUDIODRIVER": "dummy", "SDL_VIDEODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
"""For pygame, which draws most of Gymnasium's pictures: no sound, no window, no word."""


def _rendered(id: str) -> gymnasium.Env | None:
    """An environment of Gymnasium that renders pictures, as it was trained in; None where there is none."""
    library, _, name = id.partition("/")
    if library != "gymnasium":
        return None
    limit = environments.spec(id).time_limit
    for variable, value in _WITHOUT_A_SCREEN.items():
        os.environ.setdefault(variable, value)
    try:
        made = gymnasium.make(name, render_mode="rgb_array", max_episode_steps=limit)
        made.reset()
        if isinstance(made.render(), np.ndarray):
            return made
    except (gymnasium.error.Error, ImportError):  # a library for pictures is missing: they are drawn
        return None
    made.close()
    return None


def _table(watched: Watched, card: ldm_jax.EnvironmentCard | None) -> list[str]:
    random, reference = (card.random_returns.mean, card.reference_returns.mean) if card else (math.nan, math.nan)

    def z(value: float) -> str:
        return number((value - random) / (reference - random), ".2f") if reference > random else "-"

    lines = [f"{'episode':>7}  {'return':>10}  {'steps':>6}  {'z':>6}"]
    for place, (total, length) in enumerate(zip(watched.returns, watched.lengths, strict=True), 1):
        lines.append(f"{place:>7}  {total:>10.5g}  {length:>6}  {z(total):>6}")
    mean = float(np.mean(watched.returns))
    scales = f"random policy {random:.5g}, reference {reference:.5g}" if card else "the policy was not trained in it"
    return [*lines, f"mean return {mean:.5g}, z {z(mean)}; {scales}"]


def _check_video(path: pathlib.Path) -> None:
    """Checks what can be known before anything is played."""
    if path.suffix != ".mp4":
        raise VideoError(f"the video is to be {path}, expected a path that ends in .mp4")
    if not path.absolute().parent.is_dir():
        raise VideoError(f"there is no folder {path.parent} for the video: make it first")
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise VideoError(
            f"a video needs ffmpeg, and there is none ({error}): pip install 'ldm_jax[video]', or leave out --video"
        ) from error


@contextlib.contextmanager
def write_video(path: pathlib.Path) -> collections.abc.Iterator[collections.abc.Callable[[np.ndarray], None]]:
    """Writes a video, whole or not at all.

    Args:
      path: of the mp4 file.

    Yields:
      What takes the next frame, `uint8 [H, W, 3]`, all of one size.

    Raises:
      VideoError: no frame came, or ffmpeg failed.
    """
    import imageio_ffmpeg

    writer: typing.Any = None
    with files.replacing(path) as aside:

        def show(frame: np.ndarray) -> None:
            nonlocal writer
            if writer is None:
                size, form = (frame.shape[1], frame.shape[0]), ["-f", "mp4"]  # its name beside does not say so
                writer = imageio_ffmpeg.write_frames(str(aside), size, fps=_FPS, macro_block_size=2, output_params=form)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # its child becomes ffmpeg at once
                    writer.send(None)
            writer.send(np.ascontiguousarray(frame, np.uint8))

        try:
            yield show
        finally:
            if writer is not None:
                writer.close()
        if not aside.exists():
            raise VideoError(f"nothing was written to {path}: there was no frame, or ffmpeg failed")
