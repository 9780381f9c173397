"""controlgym's linear systems and partial differential equations, under its own names."""

import sys
import types

import gymnasium

_LINEAR = (
    *("toy", "ac1", "ac2", "ac3", "ac4", "ac5", "ac6", "ac7", "ac8", "ac9", "ac10", "bdt1", "bdt2", "cbm", "cdp"),
    *("cm1", "cm2", "cm3", "cm4", "cm5", "dis1", "dis2", "dlr", "he1", "he2", "he3", "he4", "he5", "he6", "iss"),
    *("je1", "je2", "lah", "pas", "psm", "rea", "umv"),
)
_PARTIAL = (
    *("allen_cahn", "burgers", "cahn_hilliard", "convection_diffusion_reaction", "fisher", "ginzburg_landau"),
    *("korteweg_de_vries", "kuramoto_sivashinsky", "schrodinger", "wave"),
)


class System(gymnasium.Wrapper):
    """A system as its library makes it: episodes end when their time is up, and `reset` has no options."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)


def make_system(name):
    """The system of a name, with the library's own defaults."""
    # Its own controllers want torch, and turn every warning of the interpreter into an error: they are left out.
    sys.modules.setdefault("controlgym.controllers", types.ModuleType("controlgym.controllers"))
    import controlgym

    environment = controlgym.make(name)
    environment.max_steps = environment.n_steps
    return System(environment)


def register():
    """Puts the systems into the registry: controlgym has a list of its own, inside its `make`."""
    for name in (*_LINEAR, *_PARTIAL):
        gymnasium.register(name, entry_point=f"{__name__}:make_system", kwargs={"name": name})
