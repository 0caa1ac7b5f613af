"""Adapters: attach, detach, save, load and merge them, and write them for other programs. The package implements
conf/adapter. It imports only packages that are earlier in README's list. Begin with tuners.py for the types, files.py
for the saved form.
"""

from flux2.adapters.files import adapter_parameters, adapters_disabled, find, load, merge, restore, save
from flux2.adapters.formats import AdapterError
from flux2.adapters.loading import unload
from flux2.adapters.strengths import set_scale
from flux2.adapters.tlora import attach_tlora
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
    "attach_tlora",
    "detach",
    "find",
    "load",
    "merge",
    "restore",
    "save",
    "set_scale",
    "unload",
]
