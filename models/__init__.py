"""Networks: a name and options become an `nn.Module`. Single-device code only; imports nothing else
of segfleet."""

import os

# What plugins add, see core/plugins.py.
__path__ += [
    os.path.join(folder, "models")
    for folder in os.environ.get("SEGFLEET_PLUGINS", "").split(os.pathsep)
    if folder
]
