"""What a conversion makes of a captured decoder: the graphs of its roles, their recipes, and how they are called."""

from .pair import Pair
from .recipes import Recipe, register

__all__ = ["Pair", "Recipe", "register"]
