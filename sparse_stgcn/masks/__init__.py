"""How a pattern is chosen: how many blocks every layer keeps (``budgets``) and which ones (``METHODS``)."""
from . import methods
from .budget import DENSITIES, SCOPES, Density, budgets, pools, spread
from .choice import LEVELS, draw, draw_levels
from .plan import METHODS, Layer, Plan, is_seeded, register

__all__ = ["DENSITIES", "LEVELS", "METHODS", "SCOPES", "Density", "Layer", "Plan", "budgets", "draw", "draw_levels",
           "is_seeded", "methods", "pools", "register", "spread"]
