"""The command line ``quantspec``: every module here that defines ``command`` is the subcommand of its name.

Modules of this package import torch and what needs it inside functions, so that ``--help`` answers at once.
"""

from .app import main

__all__ = ["main"]
