"""Adapters: attached to a model and detached from it, trained, saved, loaded, merged, and written for other programs.
It imports flux2.weights and what stands below. Begin with tuners.py for the types, files.py for what is saved.
"""

from flux2.adapters.files import adapter_parameters, adapters_disabled, find, load, merge, restore, save
from flux2.adapters.formats import AdapterError
from flux2.adapters.tuners import attach, attach_dora, attach_loha, attach_lokr, attach_oft, attach_pissa, detach

__all__ = [
    "AdapterError",
    "adapter_parameters",
    "adapters_disabled",
    "attach",
    "attach_dora",
    "attach_loha",
    "attach_lokr",
    "attach_oft",
    "attach_pissa",
    "detach",
    "find",
    "load",
    "merge",
    "restore",
    "save",
]
