"""Recipes: one flat YAML file that says what to train, on what, and how."""

from hf_delta.recipe.find import find_recipe, list_recipes
from hf_delta.recipe.load import TRAINERS, Recipe, load_recipe


__all__ = ["TRAINERS", "Recipe", "find_recipe", "list_recipes", "load_recipe"]
