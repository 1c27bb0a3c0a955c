"""The command line ``quantspec``: a module for each command, which ``commands`` lists.

Modules import torch and what needs it inside functions, or have a leading underscore and are loaded by a command when
it runs, so that ``--help`` answers at once.
"""

from .app import main

__all__ = ["main"]
