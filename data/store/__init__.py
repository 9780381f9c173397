"""The trajectory store: one group of immutable parts per environment, made visible by one record per environment.

    <url>/manifest.json                     written first: the schema version, and the configuration of the data
    <url>/manifest/<id>.json                the record of a group, written last, replaced as a whole
    <url>/<id>/card-<hash>.json             the environment card
    <url>/<id>/part-00001/<leaf>            one zarr3 array [T, B, ...] per leaf of `ldm_jax.encoding.transition`
    <url>/<id>/part-00001/episodes.npy      the episode index, one NumPy record per episode

What no record names does not exist, so a writer may die anywhere: it loses the part in flight and no more. A record is
small and of one environment, so appending costs the part, whatever the number of environments. A claim file beside a
part in flight keeps two writers from using one folder; the next writer of the group takes over the claim, and the
leftovers, of a writer that died.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
