"""The trajectory store: one group of immutable parts per environment, made visible by one manifest.

    <url>/manifest.json                     written last, replaced as a whole
    <url>/<id>/card-<hash>.json             the environment card
    <url>/<id>/part-00001/<leaf>            one zarr3 array [T, B, ...] per leaf of `ldm_jax.encoding.transition`
    <url>/<id>/part-00001/episodes.npy      the episode index, one NumPy record per episode

What the manifest does not name does not exist, so a writer may die anywhere: it loses the part in flight and no more. A
claim file beside a part in flight keeps two writers from using one folder; the next writer of the group takes over the
claim, and the leftovers, of a writer that died.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
