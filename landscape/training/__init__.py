"""Recipes, trained, recorded, resumed."""
