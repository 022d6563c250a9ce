"""Recipes: experiments as YAML."""
